//! The operator's commands: each is one or a few calls of the coordinator's API, shown as a table or as JSON.
//!
//! ```text
//! session     identity, connection, names, errors of calls        values      what is typed and shown: times, sizes, points
//! failure     what went wrong, what to do, exit code              output      tables, JSON, questions
//! documents   the shapes of the JSON                              enrol       join, token
//! proxies · policy · group · placement · disk · machine · point · failover · failback · plan · view · status · rpo · watch · audit     a module for each command
//! ```

use std::process::ExitCode;

use afterimage_wire::v1;
use clap::{Args, Subcommand};

pub mod advise;
pub mod apply;
pub mod audit;
pub mod ca;
pub mod certificate;
pub mod disk;
pub mod documents;
pub mod enrol;
pub mod failback;
pub mod failover;
pub mod failure;
pub mod group;
pub mod key;
pub mod local;
pub mod machine;
pub mod output;
pub mod pause;
pub mod placement;
pub mod plan;
pub mod point;
pub mod policy;
pub mod proxies;
pub mod rpo;
pub mod session;
pub mod status;
pub mod top;
pub mod values;
pub mod view;
pub mod watch;

use failure::{Failure, Kind};
use output::Mood;
use session::{Common, Recent, Session};

use crate::{doctor, init};

/// What the exit codes mean, for the end of the help.
pub const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  tried and failed; or `status --check` or `doctor` found something wrong
  2  the command line, or a value in it, makes no sense
  3  refused: not allowed by the certificate or in the object's state, or not confirmed
  4  the coordinator, or a proxy that it needs, cannot be reached
  5  there is no object of that name
  6  there is an object of that name already, or it has changed meanwhile
  7  `apply --dry-run` found a difference

Environment:
  AFTERIMAGE_IDENTITY     who is asking: the file that `afterimage join` wrote
  AFTERIMAGE_COORDINATOR  where the coordinator is, HOST:PORT, instead of where the identity says
  NO_COLOR                no colours";

/// The operator's commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Join as an operator: spend a token, keep the identity that it gives.
    #[command(after_help = "Examples:\n  \
        afterimage join aij1_eyJ…\n  \
        ssh coordinator afterimage token create anna --role operator | afterimage join -\n  \
        afterimage join aij1_eyJ… --coordinator 192.0.2.7:7700 --identity ./anna.json")]
    Join(With<enrol::Join>),
    /// Make tokens by which proxies and people join.
    Token(Verbs<enrol::Verb>),
    /// The authority that issues certificates; replace it.
    Ca(Verbs<ca::Verb>),
    /// Keys of groups, and the recovery key: list, rotate and rewrap them.
    Key(Verbs<key::Verb>),
    /// Certificates: who has one until when; revoke them.
    Certificate(Verbs<certificate::Verb>),
    /// List, show and remove proxies. (`afterimage proxy` runs one.)
    #[command(after_help = "Examples:\n  afterimage proxies\n  afterimage proxies show dr --json")]
    Proxies(Proxies),
    /// Policies: RPO, cuts, retention.
    Policy(Verbs<policy::Verb>),
    /// Groups: machines whose disks share one history.
    Group(Verbs<group::Verb>),
    /// Where groups go that name no target, and why.
    Placement(Verbs<placement::Verb>),
    /// Disks of groups.
    Disk(Verbs<disk::Verb>),
    /// Machines: what runs from a group's disks, started and stopped by failovers.
    Machine(Verbs<machine::Verb>),
    /// Restore points: cuts, times, single writes.
    Point(Verbs<point::Verb>),
    /// Fail over: start a group from its replica, at any point.
    Failover(Verbs<failover::Verb>),
    /// Fail back: bring a group that runs from its replica to its source again, with all that was written.
    Failback(Verbs<failback::Verb>),
    /// Plans: groups in an order, failed over together, tried, brought back.
    Plan(Verbs<plan::Verb>),
    /// Views: any restore point as disks, beside what is running.
    View(Verbs<view::Verb>),
    /// How groups and proxies stand now.
    #[command(after_help = "Examples:\n  \
        afterimage status\n  \
        afterimage status shop\n  \
        afterimage status --check || page-somebody\n  \
        afterimage status shop --json | jq '.groups[0].rpo.now_ms'")]
    Status(With<status::Status>),
    /// How groups stand, live: a picture on a terminal, lines elsewhere.
    #[command(after_help = "Examples:\n  \
        afterimage watch shop --interval 250ms\n  \
        afterimage watch --events\n  \
        afterimage watch --json | jq 'select(.type == \"event\")'")]
    Watch(With<watch::Watch>),
    /// Groups and proxies, live, sorted by what needs a look; `status` once where there is no terminal.
    #[command(after_help = "Examples:\n  \
        afterimage top\n  \
        afterimage top --sort lag --interval 250ms\n\n\
        Keys: q quits, ? explains the others; enter shows all about a group.")]
    Top(With<top::Top>),
    /// The RPO over time: a table of all groups, or a chart of one and where the time went.
    #[command(after_help = "Examples:\n  \
        afterimage rpo\n  \
        afterimage rpo shop --last 1h\n  \
        afterimage rpo shop --from 2026-11-01T00:00:00Z --to 2026-12-01T00:00:00Z --step 24h --json")]
    Rpo(With<rpo::Rpo>),
    /// What has happened: the newest 10,000 events.
    #[command(after_help = "Examples:\n  afterimage events --limit 10\n  afterimage events --json")]
    Events(With<Recent>),
    /// Who has changed what: the audit log.
    Audit(Verbs<audit::Verb>),
    /// Bring about what a document says: policies, groups, disks, plans.
    #[command(after_help = "Examples:\n  \
        afterimage apply -f site.toml --dry-run            what would change; exit code 7 if anything\n  \
        afterimage apply -f policies.toml -f groups.toml\n  \
        generate | afterimage apply -f - --yes --json\n\n\
        A document (TOML):\n  \
        [policy.gold]                         # as in `policy create`: retention, lease, hours = [\"…\"], …\n  \
        rpo = \"500ms\"\n  \
        retention = \"8h\"\n  \
        [group.shop]\n  \
        policy = \"gold\"\n  \
        source = \"src-1\"                      # source, target: for a group that is new\n  \
        target = \"dr\"\n  \
        [group.shop.disk.data]                # also: size, block, serial, export, seed\n  \
        path = \"/dev/vg0/data\"\n  \
        [plan.site]                           # also: parallel, description\n  \
        steps = [\"db\", \"shop after=db\"]      # as in `plan create`\n\n\
        What it does not say stays as it is. All is checked before anything is done; a second time there is nothing to\n\
        change and nothing is sent. It never deletes anything, never changes source, target, or a disk that is there.")]
    Apply(With<apply::Apply>),
    /// Look whether this host is fit for its role, and say what to do.
    #[command(after_help = "Examples:\n  \
        afterimage doctor                                     this host, before anything is set up\n  \
        afterimage doctor proxy --config /etc/afterimage/proxy.toml\n  \
        afterimage doctor coordinator --probe 10s\n  \
        afterimage doctor --folder /srv/journal --connect 10.0.0.6:7800 --probe 1s\n  \
        afterimage doctor proxy --json | jq '.checks[] | select(.state != \"ok\")'\n\n\
        Each line is ok, warn (it works, but not as well as it could) or fail. Nothing is changed; what is written to\n\
        measure a disk is gone at the end. Limits are those of this process: a service has those of its unit.")]
    Doctor(With<doctor::Doctor>),
    /// Write a configuration file for a role: every setting, what it is for, and its default.
    #[command(after_help = "Examples:\n  \
        afterimage init coordinator --advertise dr.example:7700 --out /etc/afterimage/coordinator.toml\n  \
        afterimage init source --name src-1 --coordinator dr.example:7700 --out /etc/afterimage/proxy.toml\n  \
        afterimage init target --coordinator dr.example:7700 --journal /srv/journal --listen 10.0.0.6:7800\n\n\
        Without --out it goes to standard output. What is written has passed the checks of its role. A coordinator\n\
        stands at the target or at a third site: on a host whose disks are protected, and a source on the\n\
        coordinator's host, are refused without --anyway.")]
    Init(With<init::Init>),
    /// The versions of this program and of what it speaks.
    Version(With<Nothing>),
}

/// A command with options of its own.
#[derive(Args, Debug)]
pub struct With<T: Args> {
    #[command(flatten)]
    own: T,
    #[command(flatten)]
    common: Common,
}

/// A command with verbs.
#[derive(Args, Debug)]
pub struct Verbs<T: Subcommand> {
    #[command(subcommand)]
    verb: T,
    #[command(flatten)]
    common: Common,
}

/// `afterimage proxies`, which lists where no verb is given.
#[derive(Args, Debug)]
pub struct Proxies {
    #[command(subcommand)]
    verb: Option<proxies::Verb>,
    #[command(flatten)]
    common: Common,
}

/// No options.
#[derive(Args, Debug)]
pub struct Nothing {}

impl Command {
    fn common(&self) -> &Common {
        match self {
            Command::Join(with) => &with.common,
            Command::Token(verbs) => &verbs.common,
            Command::Ca(verbs) => &verbs.common,
            Command::Key(verbs) => &verbs.common,
            Command::Certificate(verbs) => &verbs.common,
            Command::Proxies(proxies) => &proxies.common,
            Command::Policy(verbs) => &verbs.common,
            Command::Group(verbs) => &verbs.common,
            Command::Placement(verbs) => &verbs.common,
            Command::Disk(verbs) => &verbs.common,
            Command::Machine(verbs) => &verbs.common,
            Command::Point(verbs) => &verbs.common,
            Command::Failover(verbs) => &verbs.common,
            Command::Failback(verbs) => &verbs.common,
            Command::Plan(verbs) => &verbs.common,
            Command::View(verbs) => &verbs.common,
            Command::Status(with) => &with.common,
            Command::Watch(with) => &with.common,
            Command::Rpo(with) => &with.common,
            Command::Top(with) => &with.common,
            Command::Events(with) => &with.common,
            Command::Audit(verbs) => &verbs.common,
            Command::Doctor(with) => &with.common,
            Command::Init(with) => &with.common,
            Command::Apply(with) => &with.common,
            Command::Version(with) => &with.common,
        }
    }
}

/// Runs a command to its end.
pub fn run(command: Command) -> ExitCode {
    let json = command.common().json;
    let command = match command {
        Command::Failover(Verbs { verb: failover::Verb::Local(local), common }) => {
            return match local::run(local, common.output()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(failure) => report(&failure, json),
            };
        }
        other => other,
    };
    // One thread: a command waits for one thing at a time.
    let done = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(act(command)),
        Err(error) => Err(Failure::new(Kind::Failed, "", format!("the runtime cannot be started: {error}"))),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(&failure, json),
    }
}

/// Says on standard error what went wrong; the exit code for it.
pub fn report(failure: &Failure, json: bool) -> ExitCode {
    if json {
        eprintln!("{}", failure.to_json());
    } else {
        eprintln!("afterimage: {failure}");
    }
    ExitCode::from(failure.kind.exit_code())
}

async fn act(command: Command) -> Result<(), Failure> {
    match command {
        Command::Join(with) => enrol::join(with.own, &with.common).await,
        Command::Token(verbs) => enrol::token(verbs.verb, &Session::open(&verbs.common).await?).await,
        Command::Ca(verbs) => ca::run(verbs.verb, &Session::open(&verbs.common).await?).await,
        Command::Key(verbs) => key::run(verbs.verb, &Session::open(&verbs.common).await?).await,
        Command::Certificate(verbs) => certificate::run(verbs.verb, &Session::open(&verbs.common).await?).await,
        Command::Proxies(args) => {
            let session = Session::open(&args.common).await?;
            proxies::run(args.verb.unwrap_or(proxies::Verb::List), &session).await
        }
        Command::Policy(verbs) => policy::run(verbs.verb, &Session::open(&verbs.common).await?).await,
        Command::Group(verbs) => group::run(verbs.verb, &Session::open(&verbs.common).await?).await,
        Command::Placement(verbs) => placement::run(verbs.verb, &Session::open(&verbs.common).await?).await,
        Command::Disk(verbs) => disk::run(verbs.verb, &Session::open(&verbs.common).await?).await,
        Command::Machine(verbs) => machine::run(verbs.verb, &Session::open(&verbs.common).await?).await,
        Command::Point(verbs) => point::run(verbs.verb, &Session::open(&verbs.common).await?).await,
        Command::Failover(verbs) => failover::run(verbs.verb, &Session::open(&verbs.common).await?).await,
        Command::Failback(verbs) => failback::run(verbs.verb, &Session::open(&verbs.common).await?).await,
        Command::Plan(verbs) => plan::run(verbs.verb, &Session::open(&verbs.common).await?).await,
        Command::View(verbs) => view::run(verbs.verb, &Session::open(&verbs.common).await?).await,
        Command::Status(with) => status::run(with.own, &Session::open(&with.common).await?).await,
        Command::Watch(with) => watch::run(with.own, &Session::open(&with.common).await?).await,
        Command::Top(with) => top::run(with.own, &Session::open(&with.common).await?).await,
        Command::Rpo(with) => rpo::run(with.own, &Session::open(&with.common).await?).await,
        Command::Events(with) => watch::events(with.own, &Session::open(&with.common).await?).await,
        Command::Audit(verbs) => match audit::copies(&verbs.verb, verbs.common.output()) {
            Some(done) => done,
            None => audit::run(verbs.verb, &Session::open(&verbs.common).await?).await,
        },
        Command::Apply(with) => apply::run(with.own, &Session::open(&with.common).await?).await,
        Command::Init(with) => init::run(with.own, &with.common).await,
        Command::Doctor(with) => doctor::run(with.own, &with.common).await,
        Command::Version(with) => {
            version(&with.common);
            Ok(())
        }
    }
}

fn version(common: &Common) {
    let document = serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "wire_version": afterimage_wire::WIRE_VERSION,
        "api": "afterimage.v1",
    });
    common.output().show(&document, || {
        output::fields(&[
            ("afterimage", env!("CARGO_PKG_VERSION").to_owned()),
            ("stream and journal", format!("version {}", afterimage_wire::WIRE_VERSION)),
            ("API", "afterimage.v1".to_owned()),
        ])
    });
}

/// How a phase is to be taken.
pub fn phase_mood(phase: v1::Phase) -> Mood {
    match phase {
        v1::Phase::Protected => Mood::Good,
        v1::Phase::Syncing | v1::Phase::FailingOver | v1::Phase::FailedOver => Mood::Care,
        v1::Phase::FailingBack | v1::Phase::FailedBack => Mood::Care,
        v1::Phase::Unspecified => Mood::Plain,
    }
}
