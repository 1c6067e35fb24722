//! `afterimage failover`: start a group from its replica, bring it back, and follow the operation that does it.

use std::time::{Duration, Instant};

use afterimage_wire::v1::{self, OperationState, StepState};
use clap::{Args, Subcommand};
use uuid::Uuid;

use super::advise;
use super::documents::{self, fence_word, group_of, id, operation_word, step_word};
use super::failure::{Failure, Kind};
use super::group::{self, object};
use super::output::{Mood, line, state, table, text};
use super::point::{api, resolve};
use super::session::{Session, every};
use super::values::{Selector, duration_ns, selector, show_count, show_duration, show_time};
use super::view::exports;

/// How long one call waits for an operation, so that its steps are seen as they are done.
const WAIT_STEP: Duration = Duration::from_millis(250);

/// How long a coordinator that cannot be reached is tried again while an operation is followed: the operation goes on
/// in it, or after its restart, whether or not it is watched.
const WAIT_RETRY: Duration = Duration::from_secs(30);

/// How an operation is begun.
#[derive(Args, Debug)]
pub struct Begin {
    /// Check only; nothing is changed.
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Return once it is started.
    #[arg(long)]
    pub(super) no_wait: bool,
    /// Why, for people; kept with the operation.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// The same id starts the same operation only once [default: a new one].
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
}

impl Begin {
    pub(super) fn reason(&self) -> String {
        self.reason.clone().unwrap_or_default()
    }

    pub(super) fn request_id(&self) -> String {
        self.request_id.clone().unwrap_or_else(|| Uuid::new_v4().to_string())
    }
}

/// Verbs of `afterimage failover`.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Fail a group over: fence its source, open a restore point as writable disks at the target.
    #[command(after_help = "Examples:\n  \
        afterimage failover start shop --to latest --dry-run             check only\n  \
        afterimage failover start shop --to latest\n  \
        afterimage failover start shop --to cut:4711\n  \
        afterimage failover start shop --to time:2026-11-21T10:00:00Z    the last write not after that\n  \
        afterimage failover start shop --to seq:1234567                  exactly that write\n  \
        afterimage failover start shop --to latest --unconfirmed shop    its machine is off: you made sure\n\n\
        Before anything is done it says what would be left behind, and asks; --yes answers.\n\
        Exit codes: 0 done, 1 a step failed (the source goes on), 3 not allowed now, 4 unreachable.")]
    Start {
        /// The group's name.
        group: String,
        /// latest, cut:N, time:2026-11-21T10:00:00Z, time:-5m (ago), seq:N.
        #[arg(long, value_name = "POINT", value_parser = selector)]
        to: Selector,
        /// Go on although nobody confirms that the source is off; NAME is the group's name, typed again.
        #[arg(long, value_name = "NAME")]
        unconfirmed: Option<String>,
        #[command(flatten)]
        start: Begin,
    },
    /// Hand a group over with nothing lost: its source holds its I/O, and all that it had captured goes along.
    #[command(after_help = "Examples:\n  \
        afterimage failover planned shop --dry-run       check only\n  \
        afterimage failover planned shop --within 5m     a long way to catch up\n\n\
        Stop the machine first: what it still writes is held and not answered.\n\
        Exit codes: 0 done, 1 a step failed (the source goes on), 3 not allowed now, 4 unreachable.")]
    Planned {
        /// The group's name.
        group: String,
        /// How long catching up may take, and again what is left once I/O is held.
        #[arg(long, value_name = "DURATION", default_value = "1m", value_parser = duration_ns)]
        within: u64,
        #[command(flatten)]
        start: Begin,
    },
    /// Bring a group that is failed over back to its source, as that left it; only what it wrote since is sent.
    #[command(after_help = "Examples:\n  \
        afterimage failover undo shop                    what was written meanwhile is kept as a branch\n  \
        afterimage failover undo shop --discard --yes    and here it is deleted\n\n\
        Stop the machine at the target first; the source's goes on when this is done.\n\
        Exit codes: 0 done, 1 a step failed (the group runs on as it did), 3 not allowed now, 4 unreachable.")]
    Undo {
        /// The group's name.
        group: String,
        /// Delete what was written to its view, instead of keeping it.
        #[arg(long)]
        discard: bool,
        /// Also while hosts have the view's disks open: they lose them.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        start: Begin,
    },
    /// Run a group that is failed over from another point, or from what is kept of an earlier one.
    #[command(after_help = "Examples:\n  \
        afterimage failover change-point shop --to time:-10m      a point before the damage\n  \
        afterimage failover change-point shop --view failover     back to what was written there\n\n\
        What was written to the present view is kept as a branch: see `afterimage view list`.\n\
        Exit codes: 0 done, 1 a step failed (the group runs on as it did), 3 not allowed now, 4 unreachable.")]
    ChangePoint {
        /// The group's name.
        group: String,
        /// latest, cut:N, time:2026-11-21T10:00:00Z, time:-5m (ago), seq:N.
        #[arg(long, value_name = "POINT", value_parser = selector, required_unless_present = "view")]
        to: Option<Selector>,
        /// A view that is kept, from `afterimage view list`.
        #[arg(long, value_name = "VIEW", conflicts_with = "to")]
        view: Option<String>,
        /// Also while hosts have the present view's disks open: they lose them.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        start: Begin,
    },
    /// Start a group's machines from a view that is thrown away, without a way out of their network, and see that they answer.
    #[command(after_help = "Examples:\n  \
        afterimage failover test shop\n  \
        afterimage failover test shop --to time:-1h --ready console:login: --ready-within 5m\n  \
        afterimage failover test shop --hold 30m      to look into them; `failover cancel` ends it sooner\n\n\
        The group stays as it is, protected or failed over. All of the test is removed at its end, whatever comes of it.\n\
        Exit codes: 0 they answered, 1 they did not, 3 not allowed now, 4 unreachable.")]
    Test {
        /// The group's name.
        group: String,
        /// latest, cut:N, time:2026-11-21T10:00:00Z, time:-5m (ago), seq:N.
        #[arg(long, value_name = "POINT", default_value = "latest", value_parser = selector)]
        to: Selector,
        /// When they count as answering: running, console:TEXT (qemu), hook:NAME, tcp:HOST:PORT [default: as defined].
        #[arg(long, value_name = "WHAT", value_parser = super::machine::ready)]
        ready: Option<v1::Readiness>,
        /// How long they have for that [default: as defined].
        #[arg(long, value_name = "DURATION", value_parser = duration_ns)]
        ready_within: Option<u64>,
        /// Leave them running for so long once they answer.
        #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = duration_ns)]
        hold: u64,
        #[command(flatten)]
        start: Begin,
    },
    /// Fail a group over at its target's host, with its source and the coordinator both gone.
    #[command(after_help = "Examples:\n  \
        afterimage failover local shop --state /var/lib/afterimage/proxy --unconfirmed shop\n  \
        afterimage failover local shop --config proxy.toml --to time:-10m --unconfirmed shop\n  \
        afterimage failover local shop --journal /srv/journal --recovery-key-file key \\\n      \
            --views unix:/run/rescue.sock --unconfirmed shop\n\n\
        The proxy of this host does it, and starts the machines that it drives; it needs no coordinator for that. Where that\n\
        proxy is gone for good, too, its journal is opened by itself. The next coordinator that this target meets takes the\n\
        failover over as it is: the group is failed over then, and undo, change-point and failback are as ever.\n\
        Exit codes: 0 done, 1 not all of it (say the same again), 3 not allowed now, 4 the proxy does not answer.")]
    Local(super::local::Local),
    /// Look at what of a group is reachable, and say which verb fits, why, and what each would lose. Changes nothing.
    #[command(after_help = "Examples:\n  \
        afterimage failover advise shop\n  \
        afterimage failover advise shop --json | jq -r .advice.command\n\n\
        Each verb is checked as by its --dry-run. What is lost is as of the last report of the source.")]
    Advise {
        /// The group's name.
        group: String,
    },
    /// Show a failover with its steps.
    Show {
        /// The operation's id, from `failover list`.
        operation: String,
    },
    /// List failovers, newest first.
    List {
        /// Only of this group.
        group: Option<String>,
        /// Only those that are not done.
        #[arg(long)]
        active: bool,
    },
    /// Give a failover up: what has been done is undone and the source goes on. Possible until its view is being opened.
    #[command(after_help = "Examples:\n  afterimage failover cancel 0f3c…\n\n\
        Exit codes: 0 it has been given up, or will be, 3 it is too late.")]
    Cancel {
        /// The operation's id, from `failover list`.
        operation: String,
        /// Return at once, and do not wait until it has been undone.
        #[arg(long)]
        no_wait: bool,
    },
    /// Wait until a failover is done, showing its steps.
    #[command(after_help = "Examples:\n  afterimage failover wait 0f3c… --for 2m")]
    Wait {
        /// The operation's id, from `failover list`.
        operation: String,
        /// Give up waiting (not the failover) after this long [default: never].
        #[arg(long = "for", value_name = "DURATION", value_parser = duration_ns)]
        at_most: Option<u64>,
    },
}

/// Runs a verb.
pub async fn run(verb: Verb, session: &Session) -> Result<(), Failure> {
    let out = session.out;
    match verb {
        Verb::Start { group, to, unconfirmed, start } => {
            if let Some(name) = &unconfirmed
                && *name != group
            {
                return Err(Failure::new(
                    Kind::Usage,
                    object(&group),
                    format!("--unconfirmed names \"{name}\", and the group to fail over is \"{group}\""),
                )
                .hint(format!("to say that the source's machine is off, write --unconfirmed {group}")));
            }
            if !start.dry_run {
                let verb = if unconfirmed.is_some() { advise::Verb::Unconfirmed } else { advise::Verb::Start };
                let loss = loss(session, &group, to, unconfirmed.is_some()).await?;
                advise::confirm(verb, &group, session, &loss).await?;
            }
            let request = v1::StartFailoverRequest {
                group: session.group(&group),
                to: Some(api(to)),
                unconfirmed: unconfirmed.is_some(),
                confirm_name: unconfirmed.unwrap_or_default(),
                validate_only: start.dry_run,
                request_id: start.request_id(),
                reason: start.reason(),
            };
            let started = session.ask(object(&group), session.failovers().start_failover(request)).await?;
            follow_to_end(session, &group, started, &start).await
        }
        Verb::Planned { group, within, start } => {
            if !start.dry_run {
                let loss = format!(
                    "Group {group} will run at its target, with all that its source has captured. All I/O of the source's \
                     disks will be held."
                );
                advise::confirm(advise::Verb::Planned, &group, session, &loss).await?;
            }
            let request = v1::StartPlannedFailoverRequest {
                group: session.group(&group),
                within_ms: (within / 1_000_000).max(1),
                validate_only: start.dry_run,
                request_id: start.request_id(),
                reason: start.reason(),
            };
            let started = session.ask(object(&group), session.failovers().start_planned_failover(request)).await?;
            follow_to_end(session, &group, started, &start).await
        }
        Verb::Undo { group, discard, force, start } => {
            if !start.dry_run {
                let written = if discard { "is deleted" } else { "does not come along, and is kept as a branch" };
                let loss = format!(
                    "Group {group} will run at its source again, as that left it. What was written to its view {written}."
                );
                advise::confirm(advise::Verb::Undo, &group, session, &loss).await?;
            }
            let request = v1::UndoFailoverRequest {
                group: session.group(&group),
                discard,
                force,
                validate_only: start.dry_run,
                request_id: start.request_id(),
                reason: start.reason(),
            };
            let started = session.ask(object(&group), session.failovers().undo_failover(request)).await?;
            follow_to_end(session, &group, started, &start).await
        }
        Verb::ChangePoint { group, to, view, force, start } => {
            let choice = match (to, view) {
                (Some(to), _) => Some(v1::change_point_request::Choice::To(api(to))),
                (None, view) => view.map(v1::change_point_request::Choice::View),
            };
            if !start.dry_run {
                let loss = format!(
                    "Group {group} will run from another place in its history. What was written to its present view does \
                     not come along, and is kept as a branch."
                );
                advise::confirm(advise::Verb::ChangePoint, &group, session, &loss).await?;
            }
            let request = v1::ChangePointRequest {
                group: session.group(&group),
                choice,
                force,
                validate_only: start.dry_run,
                request_id: start.request_id(),
                reason: start.reason(),
            };
            let started = session.ask(object(&group), session.failovers().change_point(request)).await?;
            follow_to_end(session, &group, started, &start).await
        }
        Verb::Test { group, to, ready, ready_within, hold, start } => {
            let request = v1::TestFailoverRequest {
                group: session.group(&group),
                to: Some(api(to)),
                readiness: ready,
                ready_within_ms: ready_within.unwrap_or_default() / 1_000_000,
                hold_ms: hold / 1_000_000,
                validate_only: start.dry_run,
                request_id: start.request_id(),
                reason: start.reason(),
            };
            let started = session.ask(object(&group), session.failovers().test_failover(request)).await?;
            follow_to_end(session, &group, started, &start).await
        }
        Verb::Advise { group } => advise::run(&group, session).await,
        Verb::Local(_) => unreachable!("done without a coordinator, by `operator::run`"),
        Verb::Cancel { operation, no_wait } => {
            let about = format!("operation \"{operation}\"");
            let request = v1::CancelOperationRequest { name: session.operation(&operation), ..Default::default() };
            let asked = session.ask(&about, session.operations().cancel_operation(request)).await?;
            let ended = if no_wait { asked } else { follow(session, asked, None).await? };
            out.show(&documents::operation(&ended), || shown(&ended));
            // Of a test that was looked at this is the end.
            if ended.state() == v1::OperationState::Done && ended.verb != "test-failover" {
                return Err(Failure::new(Kind::Refused, about, "it was done before it could be given up"));
            }
            Ok(())
        }
        Verb::Show { operation } => {
            let found = get(session, &operation).await?;
            out.show(&documents::operation(&found), || shown(&found));
            Ok(())
        }
        Verb::List { group, active } => {
            if let Some(group) = &group {
                group::get(session, group).await?;
            }
            let request =
                v1::ListOperationsRequest { parent: session.tenant(), active_only: active, ..Default::default() };
            let all: Vec<v1::Operation> = every!(session, "operations", operations.list_operations(request).operations);
            // Runs of plans are shown by `plan history`.
            let fits = |operation: &v1::Operation| {
                operation.plan_run.is_none() && group.as_ref().is_none_or(|g| group_of(&operation.subject) == g)
            };
            let found: Vec<v1::Operation> = all.into_iter().filter(fits).collect();
            let document = found.iter().map(documents::operation).collect::<Vec<_>>();
            out.show(&serde_json::json!({"failovers": document}), || listed(&found));
            Ok(())
        }
        Verb::Wait { operation, at_most } => {
            let found = get(session, &operation).await?;
            let ended = follow(session, found, at_most.map(Duration::from_nanos)).await?;
            end(session, &ended)
        }
    }
}

/// What has been started, until it is done unless that is not wanted.
pub(super) async fn follow_to_end(
    session: &Session,
    group: &str,
    started: v1::Operation,
    how: &Begin,
) -> Result<(), Failure> {
    if how.no_wait && !started.validate_only {
        session.out.show(&documents::operation(&started), || {
            let (verb, name) = (&started.verb, id(&started.name));
            format!("{verb} {name} of group {group} started; follow it: afterimage failover wait {name}")
        });
        return Ok(());
    }
    let ended = if started.validate_only { started } else { follow(session, started, None).await? };
    end(session, &ended)
}

async fn get(session: &Session, operation: &str) -> Result<v1::Operation, Failure> {
    let request = v1::GetOperationRequest { name: session.operation(operation) };
    session.ask(format!("failover \"{operation}\""), session.operations().get_operation(request)).await
}

/// What the failover leaves behind, said before it is started.
async fn loss(session: &Session, group: &str, to: Selector, unconfirmed: bool) -> Result<String, Failure> {
    let point = resolve(session, group, to).await?;
    let status = advise::standing(session, group).await?.status;
    Ok(said(group, to, &point, &status, unconfirmed))
}

fn said(group: &str, to: Selector, point: &v1::Point, status: &v1::GroupStatus, unconfirmed: bool) -> String {
    let mut said =
        format!("Group {group} will run from the point {to}: write {} of {}.\n", point.seq, show_time(point.wall_ns));
    let left = status.durable_seq.saturating_sub(point.seq);
    if left > 0 && to != Selector::Latest {
        said += &format!("Left behind on the old branch of history: {} later writes.\n", show_count(left));
    }
    match status.rpo.as_ref().and_then(|rpo| rpo.now_us) {
        Some(us) => {
            said += &format!(
                "Lost at most: what was written in the last {} (RPO now), if the source is gone.\n",
                show_duration(us.saturating_mul(1000))
            );
        }
        None => said += "How much is lost if the source is gone is not known: nothing has been reported.\n",
    }
    said += if unconfirmed {
        "The source is fenced if it can be reached. If it cannot and its machine still runs, both will be written to, \
         and what is written at the source from now on does not come over."
    } else {
        "All I/O of the source's disks will be held."
    };
    said
}

/// Follows an operation to its end, a line for each step as it is done.
pub(super) async fn follow(
    session: &Session,
    mut operation: v1::Operation,
    at_most: Option<Duration>,
) -> Result<v1::Operation, Failure> {
    let name = operation.name.clone();
    let object = format!("failover \"{}\"", id(&name));
    let begun = Instant::now();
    let mut heard = Instant::now();
    let mut told = 0;
    let mut newer: Option<Session> = None;
    loop {
        let session = newer.as_ref().unwrap_or(session);
        if session.is_due()
            && let Ok(opened) = session.again().await
        {
            newer = Some(opened);
            continue;
        }
        if !session.out.json {
            told = tell(&operation, told);
        }
        if matches!(operation.state(), OperationState::Done | OperationState::Failed | OperationState::Stopped) {
            return Ok(operation);
        }
        if at_most.is_some_and(|most| begun.elapsed() >= most) {
            let message = format!("not done after {}", show_duration(begun.elapsed().as_nanos() as u64));
            return Err(Failure::new(Kind::Failed, object, message)
                .hint(format!("it goes on; look again: afterimage failover show {}", id(&name))));
        }
        let request = v1::WaitOperationRequest { name: name.clone(), timeout_ms: WAIT_STEP.as_millis() as u64 };
        match session.ask(&object, session.operations().wait_operation(request)).await {
            Ok(now) => {
                operation = now;
                heard = Instant::now();
            }
            Err(failure) if failure.kind == Kind::Unreachable && heard.elapsed() < WAIT_RETRY => {
                tokio::time::sleep(WAIT_STEP).await;
                if let Ok(opened) = session.again().await {
                    newer = Some(opened);
                }
            }
            Err(failure) => return Err(failure),
        }
    }
}

/// Says the steps that have ended since `told` of them; how many that makes.
fn tell(operation: &v1::Operation, told: usize) -> usize {
    let ended = |step: &&v1::Step| !matches!(step.state(), StepState::Pending | StepState::Running);
    let mut ended: Vec<&v1::Step> = operation.steps.iter().filter(ended).collect();
    if operation.plan_run.is_some() {
        // They do not end in the order of the plan.
        ended.sort_by_key(|step| step.end_time_ns);
    }
    for step in ended.iter().skip(told) {
        line(&step_line(step));
    }
    ended.len().max(told)
}

fn step_line(step: &v1::Step) -> String {
    let took = match step.end_time_ns.checked_sub(step.start_time_ns) {
        Some(ns) if step.start_time_ns > 0 => show_duration(ns),
        _ => String::new(),
    };
    format!("{:<18} {:<8} {took:>9}  {}", step.name, step_word(step.state()), step.detail).trim_end().to_owned()
}

/// Shows how it ended; a failed one is a failure of the command.
fn end(session: &Session, operation: &v1::Operation) -> Result<(), Failure> {
    let out = session.out;
    if out.json {
        out.show(&documents::operation(operation), String::new);
    } else if operation.validate_only {
        line(shown(operation).trim_end());
    }
    match (operation.state(), &operation.error) {
        (OperationState::Failed, error) => {
            let error = error.clone().unwrap_or_default();
            let message = match error.step.as_str() {
                "" => format!("failed: {}", error.message),
                step => format!("failed at step {step}: {}", error.message),
            };
            // Checks that do not pass are a refusal: nothing has been tried.
            let kind = if error.step == "check" { Kind::Refused } else { Kind::Failed };
            Err(Failure::new(kind, object(group_of(&operation.subject)), message).hint(error.remedy))
        }
        _ => {
            if !operation.validate_only {
                out.note(result(operation).trim_end());
            }
            match operation.steps.iter().find(|step| step.state() == StepState::Failed) {
                None => Ok(()),
                Some(step) => {
                    let message = format!("done, but for the step {}: {}", step.name, step.detail);
                    let hint = "look at the machine there; afterimage machine probe says how it stands";
                    Err(Failure::new(Kind::Failed, object(group_of(&operation.subject)), message).hint(hint))
                }
            }
        }
    }
}

/// What a failover that is done has brought about.
fn result(operation: &v1::Operation) -> String {
    let Some(result) = &operation.failover else { return String::new() };
    let group = group_of(&operation.subject);
    let mut shown = String::new();
    if operation.verb == "test-failover" {
        let point = result.point.clone().unwrap_or_default();
        let time = show_time(point.wall_ns);
        return format!("group {group} starts from write {} of {time}; all of the test is removed\n", point.seq);
    }
    shown += &match operation.verb.as_str() {
        "undo-failover" => format!("group {group} runs at its source again\n"),
        "failback" => format!("what is written at group {group}'s target is protected back to its source\n"),
        "cancel-failback" => format!("group {group} stays failed over\n"),
        "switch-failback" => format!("group {group} runs at its source, with all that was written at its target\n"),
        "commit-failback" => format!("group {group} stays at its source\n"),
        _ => String::new(),
    };
    if let Some(point) = &result.point {
        shown += &format!("group {group} is at write {} of {}", point.seq, show_time(point.wall_ns));
        shown += &match result.fence() {
            v1::FenceKind::Unspecified => "\n".to_owned(),
            fence => format!("; its source is fenced ({})\n", fence_word(fence)),
        };
    }
    if result.generation > 0 {
        shown += &format!("generation of its disks: {}\n", result.generation);
    }
    if result.generation > 0 && result.point.is_some() {
        shown += &format!("RPO as it was shown when this began: {}\n", show_duration(result.rpo_at_start_us * 1000));
    }
    if let Some(branch) = &result.branch {
        shown += &format!("what was written meanwhile is kept as the view {}\n", id(&branch.name));
    }
    let started = operation.steps.iter().any(|step| step.name == "start-replica" && step.state() == StepState::Done);
    if let Some(view) = &result.view {
        shown += if started { "its machine runs from:\n" } else { "start its machine from:\n" };
        shown += &exports(view);
    }
    shown
}

fn shown(operation: &v1::Operation) -> String {
    // A dry run is stored nowhere and has no name.
    let what = match operation.validate_only {
        true => format!("dry run of {}", operation.verb),
        false => format!("{} {}", operation.verb, id(&operation.name)),
    };
    let state = operation_word(operation.state());
    let mut shown = format!("{what} of group {}: {state}\n", group_of(&operation.subject));
    if operation.create_time_ns > 0 {
        shown += &format!("started {} by {}\n", show_time(operation.create_time_ns), operation.actor);
    }
    shown += "\n";
    for step in &operation.steps {
        shown += &step_line(step);
        shown += "\n";
    }
    if let Some(error) = &operation.error {
        shown += &format!("\nfailed at step {}: {}\n  to do: {}\n", error.step, error.message, error.remedy);
    }
    if operation.failover.is_some() && !operation.validate_only {
        shown += "\n";
        shown += &result(operation);
    }
    shown
}

fn listed(operations: &[v1::Operation]) -> String {
    if operations.is_empty() {
        return "no failovers".to_owned();
    }
    table(
        &["=FAILOVER", "GROUP", "VERB", "STATE", "STARTED", ">TOOK"],
        operations.iter().map(|operation| {
            let mood = match operation.state() {
                OperationState::Done => Mood::Good,
                OperationState::Failed => Mood::Bad,
                _ => Mood::Care,
            };
            let took = operation.end_time_ns.checked_sub(operation.create_time_ns).map(show_duration);
            vec![
                text(id(&operation.name)),
                text(group_of(&operation.subject)),
                text(&operation.verb),
                state(operation_word(operation.state()), mood),
                text(show_time(operation.create_time_ns)),
                text(took.unwrap_or_default()),
            ]
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failover() -> v1::Operation {
        v1::Operation {
            name: "tenants/default/operations/3c0e5f0a-94a7-4a52-9d29-1b7f5d3f6f11".into(),
            subject: format!("tenants/default/groups/{}", "g".repeat(63)),
            verb: "failover".into(),
            actor: "operator/anna".into(),
            state: OperationState::Done.into(),
            create_time_ns: 1_700_000_000_000_000_000,
            end_time_ns: 1_700_000_000_120_000_000,
            steps: vec![
                v1::Step {
                    name: "raise-generation".into(),
                    state: StepState::Done.into(),
                    detail: "2".into(),
                    start_time_ns: 1_700_000_000_000_000_000,
                    end_time_ns: 1_700_000_000_004_000_000,
                },
                v1::Step { name: "open-view".into(), state: StepState::Running.into(), ..Default::default() },
            ],
            ..Default::default()
        }
    }

    #[test]
    fn a_table_of_failovers_fits_100_columns() {
        let shown = listed(&[failover()]);
        assert!(shown.lines().all(|line| line.chars().count() <= 100), "{shown}");
        assert!(shown.contains("120 ms"));
    }

    #[test]
    fn a_step_says_its_state_how_long_and_what() {
        let operation = failover();
        assert_eq!(step_line(&operation.steps[0]), "raise-generation   done       4.00 ms  2");
        assert_eq!(step_line(&operation.steps[1]), "open-view          running");
    }

    #[test]
    fn only_steps_that_have_ended_are_told_and_only_once() {
        let operation = failover();
        assert_eq!(tell(&operation, 0), 1);
        assert_eq!(tell(&operation, 1), 1);
    }

    #[test]
    fn what_is_left_behind_is_said_before() {
        let point = v1::Point { seq: 100, wall_ns: 1_700_000_000_000_000_000, ..Default::default() };
        let status = v1::GroupStatus {
            durable_seq: 1_350,
            rpo: Some(v1::Rpo { now_us: Some(8_000), ..Default::default() }),
            ..Default::default()
        };
        let text = said("shop", Selector::Seq(100), &point, &status, false);
        assert!(text.contains("1_250 later writes") && text.contains("8.00 ms") && text.contains("held"), "{text}");
        let text = said("shop", Selector::Latest, &point, &v1::GroupStatus::default(), true);
        assert!(text.contains("not known") && text.contains("both will be written to"), "{text}");
    }
}
