//! Machines within the verbs, step by step, at hosts that are scripts: what is on there is what counts.

use std::collections::BTreeSet;

use afterimage_wire::v1::{MachinePower, MachineRole, MachineState};

use super::tests::{disks, error, group, obeyed};
use super::*;
use crate::machine::{Driver, Firmware, Machine, MachineDisk, Place, Ready};
use crate::objects::PointRecord;

fn machine(id: &str) -> Driven {
    let driven = || Place { driver: Driver::Hook, profile: "default".into(), ..Place::default() };
    let machine = Machine {
        uid: id.into(),
        tenant: "default".into(),
        id: id.into(),
        version: 1,
        created_ns: 1,
        updated_ns: 1,
        description: String::new(),
        group: "shop".into(),
        disks: Vec::new(),
        cpus: 1,
        memory: 1 << 30,
        firmware: Firmware::Bios,
        nics: Vec::new(),
        source: driven(),
        target: driven(),
        ready: Ready::Running,
        stop_within_ms: 1_000,
        ready_within_ms: 1_000,
        stopped_at_source: false,
        runs_from: String::new(),
    };
    let disk =
        MachineDisk { id: "data".into(), uid: "d1".into(), serial: "s".into(), size: 1, export_name: "x".into() };
    Driven { machine, disks: vec![disk], was_on: None }
}

fn changing() -> GroupPhase {
    GroupPhase::Changing { operation: "op".into(), view: FAILOVER_VIEW.into() }
}

fn over() -> Group {
    Group { generation: 2, hold: true, phase: changing(), ..group() }
}

/// A verb with two machines; of a group that is failed over they run from its view.
fn begun(verb: Verb, fences: bool) -> (Failover, Group) {
    let of_over = verb.is_of_failed_over();
    let mut machines = vec![machine("web"), machine("db")];
    if of_over {
        machines.iter_mut().for_each(|m| {
            m.machine.runs_from = FAILOVER_VIEW.into();
            m.machine.stopped_at_source = true;
        });
    }
    let spec = Spec { within_ms: 1_000, ..Spec::new(verb, Choice::Latest) };
    let views = match verb {
        Verb::ChangePoint => ("failover-2", FAILOVER_VIEW),
        Verb::UndoFailover => ("", FAILOVER_VIEW),
        _ => (FAILOVER_VIEW, ""),
    };
    let mut work = Failover::new(spec, &[], views, 0, 0, "ok".into(), 5);
    work.facts.disks = vec!["d1".into()];
    (work.with_machines(machines, fences, Vec::new()), if of_over { over() } else { group() })
}

/// The hosts of the machines: what is on there, and whose orders fail.
#[derive(Clone, Default)]
struct Hosts {
    source: BTreeSet<String>,
    replica: BTreeSet<String>,
    /// By what is said: "start", "stop", "probe", and the role.
    fails: Option<(&'static str, MachineRole, &'static str)>,
    unready: bool,
    told: Vec<String>,
}

impl Hosts {
    fn running() -> Self {
        Self { source: ["web", "db"].map(str::to_owned).into(), ..Self::default() }
    }

    fn failed_over() -> Self {
        Self { replica: ["web", "db"].map(str::to_owned).into(), ..Self::default() }
    }

    fn obey(&mut self, order: &Order) -> Stands {
        let (word, machine) = match &order.tell {
            Tell::StartInstance(s) => ("start", s.machine.clone().unwrap()),
            Tell::StopInstance(s) => ("stop", s.machine.clone().unwrap()),
            Tell::ProbeInstance(p) => ("probe", p.machine.clone().unwrap()),
            other => panic!("{other:?}"),
        };
        let role = machine.role();
        self.told.push(format!(
            "{word} {} {}",
            if role == MachineRole::Source { "source" } else { "replica" },
            machine.instance
        ));
        if self.fails.is_some_and(|(w, r, id)| (w, r, id) == (word, role, machine.instance.as_str())) {
            return Err("gone".into());
        }
        let all = if role == MachineRole::Source { &mut self.source } else { &mut self.replica };
        match word {
            "start" => drop(all.insert(machine.instance.clone())),
            "stop" => drop(all.remove(&machine.instance)),
            _ => {}
        }
        let on = all.contains(&machine.instance);
        let power = if on { MachinePower::On } else { MachinePower::Off };
        Ok(Outcome::Machine(MachineState { power: power.into(), ready: on && !self.unready, detail: String::new() }))
    }

    fn reply(&mut self, action: &Action) -> Reply {
        match action {
            Action::Machines(orders) => Reply::Machines(orders.iter().map(|order| self.obey(order)).collect()),
            Action::CatchUp { .. } => Reply::CaughtUp(0),
            Action::Drain { seq, .. } => Reply::Drained(*seq),
            Action::Tell { command, .. } => obeyed(command),
            _ => Reply::Nothing,
        }
    }

    /// Nowhere does a machine run twice.
    fn check(&self, work: &Failover) {
        let both = self.source.intersection(&self.replica).count();
        assert_eq!(both, 0, "a machine runs at both sites: {:?} {:?}", self.told, work.steps);
    }
}

fn play(work: &mut Failover, group: &mut Group, hosts: &mut Hosts, mut fault: impl FnMut(&Action) -> Option<Reply>) {
    for now in 10.. {
        let action = work.begin(group, now);
        if action == Action::Ended {
            return;
        }
        let reply = fault(&action).unwrap_or_else(|| hosts.reply(&action));
        hosts.check(work);
        work.apply(group, &disks(), reply, now);
        assert!(now < 60, "it does not end: {:?}", work.steps);
    }
}

fn names(work: &Failover) -> Vec<&'static str> {
    work.steps.iter().map(|s| s.name.as_str()).collect()
}

fn marks(work: &Failover) -> (bool, String) {
    work.machine_marks(&work.facts.machines[0])
}

fn count(set: &BTreeSet<String>) -> usize {
    set.len()
}

#[test]
fn a_planned_failover_switches_off_here_and_on_there() {
    let ((mut work, mut group), mut hosts) = (begun(Verb::PlannedFailover, true), Hosts::running());
    play(&mut work, &mut group, &mut hosts, |_| None);
    let steps = "check catch-up stop-source fence drain raise-generation resolve-point open-view start-replica \
                 await-replica finish";
    assert_eq!(names(&work).join(" "), steps);
    assert_eq!((work.state, count(&hosts.source), count(&hosts.replica)), (State::Done, 0, 2));
    assert_eq!(hosts.told[..2], ["probe source web", "probe source db"], "asked before anything is switched off");
    assert_eq!(marks(&work), (true, FAILOVER_VIEW.to_owned()));
}

#[test]
fn what_was_off_before_stays_off_when_it_is_undone() {
    let ((mut work, mut group), mut hosts) = (begun(Verb::PlannedFailover, true), Hosts::running());
    hosts.source.remove("db");
    let lost = |action: &Action| matches!(action, Action::Drain { .. }).then_some(Reply::Drained(1));
    play(&mut work, &mut group, &mut hosts, lost);
    assert_eq!((work.state, group.hold), (State::Failed, false));
    assert_eq!(hosts.source, ["web".to_owned()].into());
    assert!(!hosts.told.contains(&"start source db".to_owned()));
    assert_eq!(marks(&work), (false, String::new()));
}

#[test]
fn a_source_whose_proxy_is_gone_is_fenced_by_who_cuts_its_power() {
    let gone = |action: &Action| match action {
        Action::Tell { command: Tell::Fence(_), .. } => Some(Reply::Unreachable("gone".into())),
        _ => None,
    };
    let ((mut work, mut group), mut hosts) = (begun(Verb::Failover, true), Hosts::running());
    play(&mut work, &mut group, &mut hosts, gone);
    assert_eq!((work.state, work.facts.fence), (State::Done, Some(FenceKind::Confirmed)));
    assert_eq!((count(&hosts.source), count(&hosts.replica)), (0, 2));

    // Who cannot say so confirms nothing: the source goes on, with what had been switched off.
    let ((mut work, mut group), mut hosts) = (begun(Verb::Failover, true), Hosts::running());
    hosts.fails = Some(("stop", MachineRole::Source, "db"));
    play(&mut work, &mut group, &mut hosts, gone);
    assert_eq!((work.state, work.error.as_ref().unwrap().step), (State::Failed, StepName::PowerOff));
    assert!(work.error.as_ref().unwrap().remedy.contains("confirm_name"));
    assert_eq!((count(&hosts.source), count(&hosts.replica)), (2, 0));

    // By name it goes on, and says what it knows.
    let ((mut work, mut group), mut hosts) = (begun(Verb::Failover, true), Hosts::running());
    hosts.fails = Some(("probe", MachineRole::Source, "db"));
    work.spec.unconfirmed = true;
    for _ in 0..40 {
        let action = work.begin(&mut group, 1);
        let reply = gone(&action).unwrap_or_else(|| hosts.reply(&action));
        work.apply(&mut group, &disks(), reply, 1);
    }
    assert_eq!((work.state, work.facts.fence), (State::Done, Some(FenceKind::Unconfirmed)));
}

#[test]
fn a_source_that_holds_its_io_keeps_its_machine() {
    let ((mut work, mut group), mut hosts) = (begun(Verb::Failover, true), Hosts::running());
    for now in 0..40 {
        let action = work.begin(&mut group, now);
        let reply = hosts.reply(&action);
        work.apply(&mut group, &disks(), reply, now);
    }
    let power_off = work.steps.iter().find(|s| s.name == StepName::PowerOff).unwrap();
    assert_eq!((work.state, power_off.state), (State::Done, StepState::Skipped));
    assert!(hosts.told.iter().all(|told| !told.contains("source")), "{:?}", hosts.told);
    assert_eq!(marks(&work), (false, FAILOVER_VIEW.to_owned()));
}

#[test]
fn a_replica_that_does_not_start_gives_everything_back() {
    for id in ["web", "db"] {
        let ((mut work, mut group), mut hosts) = (begun(Verb::PlannedFailover, true), Hosts::running());
        hosts.fails = Some(("start", MachineRole::Replica, id));
        play(&mut work, &mut group, &mut hosts, |_| None);
        assert_eq!((work.state, work.error.as_ref().unwrap().step), (State::Failed, StepName::StartReplica));
        assert_eq!((group.hold, &group.phase), (false, &GroupPhase::Protecting));
        assert_eq!((count(&hosts.source), count(&hosts.replica)), (2, 0));
        let tail = names(&work);
        let tail = &tail[tail.len() - 5..];
        assert_eq!(tail, ["stop-replica", "close-view", "return-generation", "release", "start-source"]);
        assert_eq!(marks(&work), (false, String::new()));
    }
}

#[test]
fn a_replica_that_runs_and_does_not_answer_is_left_running() {
    let ((mut work, mut group), mut hosts) = (begun(Verb::PlannedFailover, true), Hosts::running());
    hosts.unready = true;
    play(&mut work, &mut group, &mut hosts, |_| None);
    assert_eq!((work.state, &work.error), (State::Done, &None));
    let awaited = work.steps.iter().find(|s| s.name == StepName::AwaitReplica).unwrap();
    assert_eq!(awaited.state, StepState::Failed);
    assert!(awaited.detail.contains("\"web\" does not answer in time"), "{}", awaited.detail);
    assert_eq!(count(&hosts.replica), 2);
}

#[test]
fn an_undoing_switches_off_there_first_and_on_here_last() {
    let ((mut work, mut group), mut hosts) = (begun(Verb::UndoFailover, false), Hosts::failed_over());
    play(&mut work, &mut group, &mut hosts, |_| None);
    let steps = "check stop-replica leave-view return-generation release start-source";
    assert_eq!(names(&work).join(" "), steps);
    assert_eq!((count(&hosts.source), count(&hosts.replica)), (2, 0));
    assert_eq!(marks(&work), (false, String::new()));

    // Nobody there: it is said, and stays noted.
    let ((mut work, mut group), mut hosts) = (begun(Verb::UndoFailover, false), Hosts::failed_over());
    hosts.fails = Some(("start", MachineRole::Source, "web"));
    play(&mut work, &mut group, &mut hosts, |_| None);
    assert_eq!((work.state, group.hold), (State::Done, false));
    assert_eq!((work.steps.last().unwrap().state, marks(&work)), (StepState::Skipped, (true, String::new())));
}

#[test]
fn a_replica_that_cannot_be_switched_off_keeps_the_group_where_it_is() {
    for verb in [Verb::UndoFailover, Verb::ChangePoint] {
        let ((mut work, mut group), mut hosts) = (begun(verb, false), Hosts::failed_over());
        hosts.fails = Some(("stop", MachineRole::Replica, "db"));
        play(&mut work, &mut group, &mut hosts, |_| None);
        assert_eq!((work.state, work.error.as_ref().unwrap().step), (State::Failed, StepName::StopReplica), "{verb:?}");
        assert_eq!((group.hold, count(&hosts.replica)), (true, 2), "{verb:?}: {:?}", hosts.told);
        assert_eq!(marks(&work), (true, FAILOVER_VIEW.to_owned()));
    }
    // Nor one whose view is not left.
    for verb in [Verb::UndoFailover, Verb::ChangePoint] {
        let ((mut work, mut group), mut hosts) = (begun(verb, false), Hosts::failed_over());
        play(&mut work, &mut group, &mut hosts, |action| match action {
            Action::Tell { command: Tell::CloseView(c), .. } if c.view == "shop.failover" => {
                Some(Reply::Answer(error("in use")))
            }
            _ => None,
        });
        assert_eq!((work.state, count(&hosts.replica)), (State::Failed, 2), "{verb:?}");
        assert_eq!(names(&work).last(), Some(&"restart-replica"));
    }
}

#[test]
fn a_changed_point_is_run_from_by_the_same_machines() {
    let ((mut work, mut group), mut hosts) = (begun(Verb::ChangePoint, false), Hosts::failed_over());
    play(&mut work, &mut group, &mut hosts, |_| None);
    let steps = "check resolve-point open-view stop-replica leave-view start-replica await-replica finish";
    assert_eq!(names(&work).join(" "), steps);
    assert_eq!((work.state, count(&hosts.replica), marks(&work).1.as_str()), (State::Done, 2, "failover-2"));
    // Past the view that was left there is no way back: it says so.
    let ((mut work, mut group), mut hosts) = (begun(Verb::ChangePoint, false), Hosts::failed_over());
    hosts.fails = Some(("start", MachineRole::Replica, "db"));
    play(&mut work, &mut group, &mut hosts, |_| None);
    assert_eq!((work.state, &group.phase), (State::Done, &GroupPhase::FailedOver { view: "failover-2".into() }));
    assert!(work.steps.iter().any(|s| s.name == StepName::StartReplica && s.state == StepState::Failed));
}

/// The coordinator dies before and after each action of each verb, and somebody gives it up at each: what ran runs once.
#[test]
fn whenever_it_is_interrupted_each_machine_runs_once() {
    for verb in [Verb::Failover, Verb::PlannedFailover, Verb::UndoFailover, Verb::ChangePoint] {
        for source_gone in [false, true] {
            for at in 0..24 {
                for (cancels, acts) in [(false, false), (false, true), (true, false), (true, true)] {
                    let (mut work, mut group) = begun(verb, true);
                    let mut hosts = if verb.is_of_failed_over() { Hosts::failed_over() } else { Hosts::running() };
                    if source_gone && verb == Verb::PlannedFailover {
                        continue;
                    }
                    for now in 0.. {
                        assert!(now < 80, "{verb:?} at {at} does not end: {:?}", work.steps);
                        let action = work.begin(&mut group, now);
                        if action == Action::Ended {
                            break;
                        }
                        let stored = serde_json::to_string(&(&work, &group)).unwrap();
                        if now == at && cancels {
                            let _ = work.cancel("operator/anna");
                        }
                        if now == at && !cancels {
                            // It dies; what it told may have been done.
                            if acts {
                                let _ = hosts.reply(&action);
                            }
                            (work, group) = serde_json::from_str(&stored).unwrap();
                            continue;
                        }
                        let fences = matches!(&action, Action::Tell { command: Tell::Fence(f), .. } if f.hold);
                        let reply = match fences && source_gone {
                            true => Reply::Unreachable("gone".into()),
                            false => hosts.reply(&action),
                        };
                        // A machine that is held does not write: with the source there both may be on for a while.
                        if verb != Verb::Failover || source_gone {
                            hosts.check(&work);
                        }
                        work.apply(&mut group, &disks(), reply, now);
                    }
                    let ctx = format!("{verb:?} at {at}, cancelled {cancels}, acted {acts}: {:?}", work.steps);
                    let at_target = group.phase.is_failed_over();
                    assert_eq!(count(&hosts.replica), if at_target { 2 } else { 0 }, "{ctx}");
                    let held = verb == Verb::Failover && !source_gone;
                    assert_eq!(count(&hosts.source), if at_target && !held { 0 } else { 2 }, "{ctx}");
                    let (_, runs_from) = marks(&work);
                    assert_eq!(runs_from.is_empty(), !at_target, "{ctx}");
                }
            }
        }
    }
}

fn trial(hold_ms: u64) -> (Failover, Group) {
    let spec = Spec { hold_ms, ..Spec::new(Verb::TestFailover, Choice::Latest) };
    let mut work = Failover::new(spec, &[], ("test-1", ""), 0, 0, "ok".into(), 5);
    work.facts.disks = vec!["d1".into()];
    work.facts.point = Some(PointRecord { seq: 90, disks: vec!["d1".into()], ..PointRecord::default() });
    let group = Group { phase: GroupPhase::Protecting, ..group() };
    (work.with_machines(vec![machine("web"), machine("db")], false, Vec::new()), group)
}

fn views(told: &mut BTreeSet<String>, action: &Action) {
    match action {
        Action::Tell { command: Tell::OpenView(open), .. } => {
            assert_eq!(open.kind(), v1::ViewKind::Test);
            told.insert(open.view.clone());
        }
        Action::Tell { command: Tell::CloseView(close), .. } => {
            assert!(!close.keep_delta);
            told.remove(&close.view);
        }
        _ => {}
    }
}

/// Played until it ends; interrupted at `at` by a crash (before or after the action was done) or by somebody.
fn tried(work: &mut Failover, group: &mut Group, hosts: &mut Hosts, at: u64, how: (bool, bool)) -> BTreeSet<String> {
    let (cancels, acts) = how;
    let before = group.clone();
    let mut open = BTreeSet::new();
    for now in 0.. {
        assert!(now < 80, "it does not end: {:?}", work.steps);
        let action = work.begin(group, now);
        if action == Action::Ended {
            break;
        }
        let stored = serde_json::to_string(&work).unwrap();
        if now == at && cancels {
            work.cancel("operator/anna").unwrap();
        } else if now == at {
            if acts {
                views(&mut open, &action);
                let _ = hosts.reply(&action);
            }
            *work = serde_json::from_str(&stored).unwrap();
            continue;
        }
        views(&mut open, &action);
        let reply = hosts.reply(&action);
        work.apply(group, &disks(), reply, now);
        assert_eq!(*group, before, "a test changes the group");
    }
    open
}

#[test]
fn a_test_leaves_nothing_behind_on_any_way_out() {
    for fails in
        [None, Some(("start", MachineRole::Test, "db.test-1")), Some(("probe", MachineRole::Test, "web.test-1"))]
    {
        for at in 0..20 {
            for how in [(false, false), (false, true), (true, false)] {
                let ((mut work, mut group), mut hosts) = (trial(60_000), Hosts::running());
                hosts.fails = fails;
                let open = tried(&mut work, &mut group, &mut hosts, at, how);
                assert!(open.is_empty() && hosts.replica.is_empty(), "at {at}, {how:?}: {:?}", work.steps);
                assert_eq!(hosts.source.len(), 2);
                let enough = work.steps.iter().any(|s| s.name == StepName::Hold && s.state == StepState::Done);
                let given_up = how.0 && !enough && at < 6;
                let good = fails.is_none() && !given_up;
                assert_eq!(work.state == State::Done, good, "at {at}, {how:?}: {:?}", work.steps);
                assert_eq!(marks(&work), (false, String::new()));
            }
        }
    }
}

#[test]
fn what_cannot_be_removed_is_tried_again_after_a_pause() {
    let ((mut work, mut group), mut hosts) = (trial(0), Hosts::running());
    let mut refusals = 3;
    for now in 10.. {
        let action = work.begin(&mut group, now);
        if action == Action::Ended {
            break;
        }
        let reply = match &action {
            Action::Tell { command: Tell::CloseView(_), .. } if refusals > 0 => {
                refusals -= 1;
                Reply::Unreachable("gone".into())
            }
            other => hosts.reply(other),
        };
        if refusals < 3 && refusals > 0 && !matches!(action, Action::Tell { .. }) {
            assert!(matches!(action, Action::Wait { ms } if ms > 100), "{action:?}");
        }
        work.apply(&mut group, &disks(), reply, now);
        assert!(now < 60, "{:?}", work.steps);
    }
    assert_eq!((work.state, refusals), (State::Done, 0));
    // Not for ever: a proxy that never comes back ends it, with what is left named.
    let ((mut work, mut group), mut hosts) = (trial(0), Hosts::running());
    for now in 1..60 {
        let action = work.begin(&mut group, now * 3_600_000_000_000);
        if action == Action::Ended {
            assert_eq!(work.steps.last().unwrap().state, StepState::Skipped);
            return;
        }
        let reply = match &action {
            Action::Tell { command: Tell::CloseView(_), .. } => Reply::Unreachable("gone".into()),
            other => hosts.reply(other),
        };
        work.apply(&mut group, &disks(), reply, now * 3_600_000_000_000);
    }
    panic!("it does not end: {:?}", work.steps);
}

/// What a proxy of a failback answers, and the machines' hosts.
fn answers(hosts: &mut Hosts, action: &Action) -> Reply {
    match action {
        Action::Merge(_) => Reply::Answer(Outcome::Merged(v1::Merged { complete: true, ..v1::Merged::default() })),
        Action::Await { .. } => Reply::Seen,
        other => hosts.reply(other),
    }
}

/// A switch to the source, or its undoing, with two machines.
fn back(verb: Verb) -> (Failover, Group, Hosts) {
    let mut machines = vec![machine("web"), machine("db")];
    let spec = Spec { within_ms: 1_000, ..Spec::new(verb, Choice::Latest) };
    let view = super::failback_tests::view();
    let (operation, id) = ("op".to_owned(), FAILOVER_VIEW.to_owned());
    let (mut work, group, hosts) = if verb == Verb::SwitchFailback {
        // "db" died with its source, and "web" was switched off: it is the replica that says what is to run.
        machines.iter_mut().for_each(|m| m.machine.runs_from = FAILOVER_VIEW.into());
        machines[0].machine.stopped_at_source = true;
        let group = Group { reverse: Some(super::failback_tests::reverse()), ..over() };
        let work = Failover::back(spec, &[], &view, ("back", 77), "ok".into(), 5);
        (work.with_machines(machines, false, Vec::new()), group, Hosts::failed_over())
    } else {
        let phase = GroupPhase::Settling { operation, view: id, after: 77 };
        let group = Group { phase, generation: 3, writer_generation: 3, overwritten: true, ..group() };
        let work = Failover::new(spec, &[], (FAILOVER_VIEW, ""), 0, 0, "ok".into(), 5).reopening(view.point);
        (work.with_machines(machines, true, Vec::new()), group, Hosts::running())
    };
    work.facts.disks = vec!["d1".into()];
    (work, group, hosts)
}

/// As [`play`], with the proxies of a failback.
fn turn(work: &mut Failover, group: &mut Group, hosts: &mut Hosts, mut fault: impl FnMut(&Action) -> Option<Reply>) {
    for now in 10.. {
        let action = work.begin(group, now);
        if action == Action::Ended {
            return;
        }
        let reply = fault(&action).unwrap_or_else(|| answers(hosts, &action));
        hosts.check(work);
        work.apply(group, &disks(), reply, now);
        assert!(now < 60, "it does not end: {:?}", work.steps);
    }
}

#[test]
fn a_switch_stops_the_replica_before_it_is_held_and_starts_the_source_last() {
    let (mut work, mut group, mut hosts) = back(Verb::SwitchFailback);
    turn(&mut work, &mut group, &mut hosts, |_| None);
    let steps = "check catch-up stop-source stop-replica fence drain raise-generation merge leave-view end-reverse \
                 drop-reverse return-generation release start-source await-source";
    assert_eq!(names(&work).join(" "), steps);
    assert_eq!((work.state, count(&hosts.source), count(&hosts.replica)), (State::Done, 2, 0));
    assert_eq!(marks(&work), (false, String::new()));

    // What had been held at the source has a past in its memory: its power is cut before the disks change.
    let (mut work, mut group, mut hosts) = back(Verb::SwitchFailback);
    hosts.source.insert("db".into());
    let mut at_merge = None;
    for now in 10..60 {
        let action = work.begin(&mut group, now);
        if matches!(action, Action::Merge(_)) {
            at_merge = Some(hosts.clone());
        }
        let reply = answers(&mut hosts, &action);
        work.apply(&mut group, &disks(), reply, now);
    }
    let at_merge = at_merge.unwrap();
    assert_eq!((count(&at_merge.source), count(&at_merge.replica)), (0, 0), "{:?}", at_merge.told);
    assert_eq!((work.state, count(&hosts.source)), (State::Done, 2));
}

#[test]
fn a_switch_whose_source_does_not_start_starts_the_replica_again() {
    for id in ["web", "db"] {
        let (mut work, mut group, mut hosts) = back(Verb::SwitchFailback);
        hosts.fails = Some(("start", MachineRole::Source, id));
        turn(&mut work, &mut group, &mut hosts, |_| None);
        assert_eq!((work.state, work.error.as_ref().unwrap().step), (State::Failed, StepName::StartSource));
        assert_eq!(group.phase, GroupPhase::FailedOver { view: FAILOVER_VIEW.into() });
        assert_eq!((count(&hosts.source), count(&hosts.replica)), (0, 2), "{:?}", hosts.told);
        let tail = names(&work);
        let tail = &tail[tail.len() - 5..];
        assert_eq!(tail, ["hold-again", "power-off", "take-again", "reopen-view", "restart-replica"]);
        assert_eq!(marks(&work), (true, FAILOVER_VIEW.to_owned()));
    }
    // Where nobody confirms that it holds, it is what runs: nothing of it is switched off.
    let (mut work, mut group, mut hosts) = back(Verb::SwitchFailback);
    hosts.fails = Some(("start", MachineRole::Source, "db"));
    turn(&mut work, &mut group, &mut hosts, |action| {
        matches!(action, Action::Await { what: Awaited::Held, .. }).then(|| Reply::NotSeen("gone".into()))
    });
    assert!(matches!(group.phase, GroupPhase::FailedBack { .. }), "{:?}", work.steps);
    assert_eq!((count(&hosts.source), count(&hosts.replica)), (1, 0));
    // One that runs and does not answer in time may have answered somebody.
    let (mut work, mut group, mut hosts) = back(Verb::SwitchFailback);
    hosts.unready = true;
    turn(&mut work, &mut group, &mut hosts, |_| None);
    let awaited = work.steps.last().unwrap();
    assert_eq!((work.state, awaited.name, awaited.state), (State::Done, StepName::AwaitSource, StepState::Failed));
    assert_eq!(count(&hosts.source), 2);
}

#[test]
fn a_switch_that_fails_before_the_view_is_left_starts_the_replica_again() {
    let (mut work, mut group, mut hosts) = back(Verb::SwitchFailback);
    turn(&mut work, &mut group, &mut hosts, |action| {
        matches!(action, Action::Drain { .. }).then_some(Reply::Drained(0))
    });
    assert_eq!(group.phase, GroupPhase::FailingBack { view: FAILOVER_VIEW.into() });
    assert_eq!((names(&work).last(), count(&hosts.replica)), (Some(&"restart-replica"), 2));
    // Nor is it taken from one that does not go off.
    let (mut work, mut group, mut hosts) = back(Verb::SwitchFailback);
    hosts.fails = Some(("stop", MachineRole::Replica, "db"));
    turn(&mut work, &mut group, &mut hosts, |_| None);
    assert_eq!((work.error.as_ref().unwrap().step, count(&hosts.replica)), (StepName::StopReplica, 2));
    assert!(!group.reverse.as_ref().unwrap().hold);
}

#[test]
fn an_undone_failback_switches_off_here_and_on_there() {
    let (mut work, mut shop, mut hosts) = back(Verb::UndoFailback);
    turn(&mut work, &mut shop, &mut hosts, |_| None);
    let steps = "check stop-source fence power-off drain raise-generation open-view start-replica await-replica finish";
    assert_eq!(names(&work).join(" "), steps);
    assert_eq!((work.state, count(&hosts.source), count(&hosts.replica)), (State::Done, 0, 2));
    assert_eq!(marks(&work), (true, FAILOVER_VIEW.to_owned()));
    // Its source gone: whoever cuts the power confirms it.
    let (mut work, mut shop, mut hosts) = back(Verb::UndoFailback);
    work = work.with_source_unasked();
    turn(&mut work, &mut shop, &mut hosts, |action| match action {
        Action::Tell { command: Tell::Fence(f), .. } if f.hold => Some(Reply::Unreachable("gone".into())),
        _ => None,
    });
    assert_eq!((work.state, work.facts.fence), (State::Done, Some(FenceKind::Confirmed)));
    assert_eq!((count(&hosts.source), count(&hosts.replica)), (0, 2));
    // A replica that does not start gives it back to the source.
    let (mut work, mut shop, mut hosts) = back(Verb::UndoFailback);
    hosts.fails = Some(("start", MachineRole::Replica, "db"));
    turn(&mut work, &mut shop, &mut hosts, |_| None);
    assert_eq!((work.state, count(&hosts.source), count(&hosts.replica)), (State::Failed, 2, 0));
    assert!(matches!(shop.phase, GroupPhase::FailedBack { .. }));
    assert_eq!(names(&work).iter().filter(|name| **name == "start-source").count(), 1);
    // With its view open for all that is known, it runs from there.
    let (mut work, mut shop, mut hosts) = back(Verb::UndoFailback);
    let mut starts = 0;
    turn(&mut work, &mut shop, &mut hosts, |action| match action {
        Action::Machines(orders) if matches!(orders[0].tell, Tell::StartInstance(_)) => {
            starts += 1;
            (starts == 1).then(|| Reply::Machines(vec![Err("no room".into()); 2]))
        }
        Action::Tell { command: Tell::CloseView(_), .. } => Some(Reply::Unreachable("gone".into())),
        _ => None,
    });
    assert_eq!(shop.phase, GroupPhase::FailedOver { view: FAILOVER_VIEW.into() }, "{:?}", work.steps);
    assert_eq!((count(&hosts.source), count(&hosts.replica), marks(&work).1.as_str()), (0, 2, FAILOVER_VIEW));
}

/// The coordinator dies before and after each action of a switch and of its undoing, with and without a machine that does
/// not start, and somebody gives it up at each: what ran runs once.
#[test]
fn whenever_a_failback_is_interrupted_each_machine_runs_once() {
    let fails = [None, Some(("start", MachineRole::Source, "db")), Some(("start", MachineRole::Replica, "db"))];
    for verb in [Verb::SwitchFailback, Verb::UndoFailback] {
        for fails in fails {
            for at in 0..30 {
                for (cancels, acts) in [(false, false), (false, true), (true, false)] {
                    let (mut work, mut group, mut hosts) = back(verb);
                    // That the replica cannot be started again is not a switch's to mend.
                    let fails =
                        fails.filter(|(_, role, _)| (*role == MachineRole::Replica) == (verb == Verb::UndoFailback));
                    hosts.fails = fails;
                    for now in 0.. {
                        assert!(now < 80, "{verb:?} at {at} does not end: {:?}", work.steps);
                        let action = work.begin(&mut group, now);
                        if action == Action::Ended {
                            break;
                        }
                        let stored = serde_json::to_string(&(&work, &group)).unwrap();
                        if now == at && cancels {
                            let _ = work.cancel("operator/anna");
                        }
                        if now == at && !cancels {
                            if acts {
                                let _ = answers(&mut hosts, &action);
                            }
                            (work, group) = serde_json::from_str(&stored).unwrap();
                            continue;
                        }
                        let reply = answers(&mut hosts, &action);
                        hosts.check(&work);
                        work.apply(&mut group, &disks(), reply, now);
                    }
                    let ctx =
                        format!("{verb:?} at {at}, cancelled {cancels}, acted {acts}, {fails:?}: {:?}", work.steps);
                    let at_target =
                        matches!(group.phase, GroupPhase::FailedOver { .. } | GroupPhase::FailingBack { .. });
                    assert_eq!(count(&hosts.replica), if at_target { 2 } else { 0 }, "{ctx}");
                    assert_eq!(count(&hosts.source), if at_target { 0 } else { 2 }, "{ctx}");
                    assert_eq!(marks(&work).1.is_empty(), !at_target, "{ctx}");
                    assert_eq!(group.hold, at_target, "{ctx}");
                }
            }
        }
    }
}
