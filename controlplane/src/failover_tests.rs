//! The failover machine, step by step, with scripted proxies.

use super::*;
use crate::problem::Problem;

const UID: &str = "6f1f7c9e-0000-4000-8000-000000000001";

pub(super) fn group() -> Group {
    let phase = GroupPhase::FailingOver { operation: "op".into() };
    Group { uid: UID.into(), created_ns: 0, updated_ns: 0, next_slot: 1, phase, ..Group::sample("shop") }
}

pub(super) fn disks() -> Vec<(String, String)> {
    vec![("d1".into(), "data".into())]
}

fn failover(to: Choice, unconfirmed: bool) -> Failover {
    let spec = Spec { unconfirmed, ..Spec::new(Verb::Failover, to) };
    let mut work = Failover::new(spec, &[], (FAILOVER_VIEW, ""), 700, 0, "ok".into(), 5);
    work.facts.disks = vec!["d1".into()];
    work
}

pub(super) fn point(seq: u64) -> v1::Point {
    v1::Point { seq, disks: vec!["d1".into()], ..v1::Point::default() }
}

fn opened() -> Outcome {
    let export = v1::ViewExport { disk: "data".into(), disk_uid: "d1".into(), ..v1::ViewExport::default() };
    Outcome::View(v1::ViewOpened { exports: vec![export] })
}

pub(super) fn error(message: &str) -> Outcome {
    Outcome::Error(v1::CommandError { kind: 1, message: message.into() })
}

/// The answer of a proxy that does as it is told.
pub(super) fn obeyed(command: &Tell) -> Reply {
    Reply::Answer(match command {
        Tell::Fence(f) if f.hold => Outcome::Fenced(v1::Fenced { last_seq: 90 }),
        Tell::RaiseGeneration(r) => {
            Outcome::Generation(v1::GenerationRaised { generation: r.at_least, zero_loss: false })
        }
        Tell::ResolvePoint(_) => Outcome::Point(point(90)),
        Tell::OpenView(_) => opened(),
        _ => Outcome::Done(v1::Done {}),
    })
}

/// Proxies that do as they are told, except where `fault` answers instead.
fn run(work: &mut Failover, group: &mut Group, mut fault: impl FnMut(&Tell) -> Option<Reply>) -> Vec<Tell> {
    let mut told = Vec::new();
    for now in 10.. {
        let reply = match work.begin(group, now) {
            Action::Ended => break,
            Action::Record | Action::Wait { .. } | Action::Machines(_) | Action::Merge(_) | Action::Await { .. } => {
                Reply::Nothing
            }
            Action::Drain { seq, .. } => Reply::Drained(seq),
            Action::CatchUp { .. } => Reply::CaughtUp(0),
            Action::Tell { command, .. } => {
                let reply = fault(&command).unwrap_or_else(|| obeyed(&command));
                told.push(command);
                reply
            }
        };
        work.apply(group, &disks(), reply, now);
        assert!(now < 50, "the machine does not end");
    }
    told
}

#[test]
fn the_steps_are_done_in_order_and_the_group_runs_from_its_view() {
    let (mut work, mut group) = (failover(Choice::Latest, false), group());
    let told = run(&mut work, &mut group, |_| None);
    assert_eq!(work.state, State::Done);
    assert!(work.steps.iter().all(|s| s.state == StepState::Done), "{:?}", work.steps);
    assert!(matches!(told[..], [Tell::Fence(_), Tell::RaiseGeneration(_), Tell::ResolvePoint(_), Tell::OpenView(_)]));
    assert_eq!(work.facts.fence, Some(FenceKind::Confirmed));
    assert_eq!(group.phase, GroupPhase::FailedOver { view: FAILOVER_VIEW.into() });
    // The source stays held, and below the disks' generation.
    assert!(group.hold);
    assert_eq!((group.generation, group.writer_generation), (2, 1));
}

#[test]
fn a_source_that_cannot_be_reached_needs_the_operators_word() {
    let gone = |t: &Tell| matches!(t, Tell::Fence(f) if f.hold).then(|| Reply::Unreachable("not connected".into()));
    let (mut work, mut shop) = (failover(Choice::Latest, true), group());
    run(&mut work, &mut shop, gone);
    assert_eq!((work.state, work.facts.fence), (State::Done, Some(FenceKind::Unconfirmed)));
    assert!(shop.hold, "it is fenced when it comes back");

    let (mut work, mut shop) = (failover(Choice::Latest, false), group());
    run(&mut work, &mut shop, gone);
    assert_eq!(work.state, State::Failed);
    let failure = work.error.unwrap();
    assert_eq!(failure.step, StepName::Fence);
    assert!(failure.remedy.contains("unconfirmed"));
    assert!(!shop.hold);
    assert_eq!((shop.generation, shop.writer_generation, &shop.phase), (1, 1, &GroupPhase::Protecting));
}

#[test]
fn a_source_with_a_lease_is_waited_for_after_its_disks_were_taken() {
    let gone = |t: &Tell| matches!(t, Tell::Fence(f) if f.hold).then(|| Reply::Unreachable("not connected".into()));
    let spec = Spec::new(Verb::Failover, Choice::Latest);
    let (mut work, mut shop) = (Failover::new(spec, &[], (FAILOVER_VIEW, ""), 700, 10_000, "ok".into(), 5), group());
    work.facts.disks = vec!["d1".into()];
    let mut waited = None;
    for now in 10.. {
        let action = work.begin(&mut shop, now);
        let raised = work.facts.generation;
        let reply = match action {
            Action::Ended => break,
            Action::Wait { ms } => {
                waited = Some((ms, raised));
                // A coordinator that restarts meanwhile waits anew.
                assert_eq!(work.clone().begin(&mut shop, now), Action::Wait { ms });
                Reply::Nothing
            }
            Action::Record | Action::Machines(_) | Action::Merge(_) | Action::Await { .. } => Reply::Nothing,
            Action::Drain { .. } | Action::CatchUp { .. } => panic!("the source is gone"),
            Action::Tell { command, .. } => gone(&command).unwrap_or_else(|| match &command {
                Tell::RaiseGeneration(r) => {
                    let raised = v1::GenerationRaised { generation: r.at_least, zero_loss: true };
                    Reply::Answer(Outcome::Generation(raised))
                }
                Tell::ResolvePoint(_) => Reply::Answer(Outcome::Point(point(90))),
                _ => Reply::Answer(opened()),
            }),
        };
        work.apply(&mut shop, &disks(), reply, now);
        assert!(now < 50);
    }
    assert_eq!((work.state, work.facts.fence), (State::Done, Some(FenceKind::SelfFenced)));
    assert_eq!(waited, Some((12_000, 2)), "a lease, a tenth, and a second after the generation was raised");
    assert!(work.facts.zero_loss);
    // With a confirmation nothing is waited for.
    let mut work = Failover::new(work.spec.clone(), &[], (FAILOVER_VIEW, ""), 700, 10_000, "ok".into(), 5);
    work.facts.disks = vec!["d1".into()];
    let mut shop = group();
    run(&mut work, &mut shop, |_| None);
    assert_eq!(work.facts.fence, Some(FenceKind::Confirmed));
    let lease = work.steps.iter().find(|s| s.name == StepName::Lease).unwrap();
    assert_eq!(lease.detail, "not needed");
}

#[test]
fn a_failure_after_the_raise_gives_the_source_a_higher_generation_and_lets_it_go_on() {
    let (mut work, mut group) = (failover(Choice::Seq(50), false), group());
    let told = run(&mut work, &mut group, |t| {
        matches!(t, Tell::OpenView(_)).then(|| Reply::Answer(error("no room for a delta")))
    });
    assert_eq!(work.state, State::Failed);
    let failure = work.error.clone().unwrap();
    assert_eq!((failure.step, failure.message.as_str()), (StepName::OpenView, "no room for a delta"));
    assert!(failure.remedy.contains("\"dr\""));
    assert!(matches!(
        told[4..],
        [Tell::CloseView(_), Tell::RaiseGeneration(_), Tell::Fence(v1::Fence { hold: false, .. })]
    ));
    assert_eq!((group.generation, group.writer_generation), (3, 3));
    assert!(!group.hold);
    assert_eq!(group.phase, GroupPhase::Protecting);
}

#[test]
fn undoing_never_hangs_on_a_proxy_that_is_gone() {
    let (mut work, mut group) = (failover(Choice::Latest, false), group());
    let mut fenced = false;
    run(&mut work, &mut group, |t| match t {
        Tell::Fence(f) if f.hold && !fenced => {
            fenced = true;
            None
        }
        _ => Some(Reply::Unreachable("lost".into())),
    });
    assert_eq!(work.state, State::Failed);
    assert_eq!(work.steps.last().unwrap().state, StepState::Skipped);
    assert!(!group.hold, "the source is told by the desired state");
    assert_eq!(group.generation, group.writer_generation);
}

#[test]
fn a_point_that_lacks_a_disk_or_is_damaged_is_not_run_from() {
    for bad in [v1::Point { disks: vec![], ..point(9) }, v1::Point { damage: "segment 3".into(), ..point(9) }] {
        let (mut work, mut group) = (failover(Choice::Seq(9), false), group());
        run(&mut work, &mut group, |t| {
            matches!(t, Tell::ResolvePoint(_)).then(|| Reply::Answer(Outcome::Point(bad.clone())))
        });
        assert_eq!(work.error.unwrap().step, StepName::ResolvePoint);
        assert_eq!(work.state, State::Failed);
    }
}

#[test]
fn an_answer_below_the_generation_asked_for_is_a_failure() {
    let (mut work, mut group) = (failover(Choice::Latest, false), group());
    run(&mut work, &mut group, |t| {
        matches!(t, Tell::RaiseGeneration(r) if r.at_least == 2)
            .then(|| Reply::Answer(Outcome::Generation(v1::GenerationRaised { generation: 1, zero_loss: false })))
    });
    assert_eq!(work.error.unwrap().step, StepName::RaiseGeneration);
}

#[test]
fn a_machine_stored_at_any_step_goes_on_from_there() {
    // Reference: an undisturbed run. Then the same, stored and read back before each step's outcome is known.
    let (mut whole, mut whole_group) = (failover(Choice::Latest, false), group());
    run(&mut whole, &mut whole_group, |_| None);
    for crash_at in 0..whole.steps.len() - 1 {
        let (mut work, mut group) = (failover(Choice::Latest, false), group());
        for _ in 0..crash_at {
            let reply = match work.begin(&mut group, 1) {
                Action::Record
                | Action::Wait { .. }
                | Action::Machines(_)
                | Action::Merge(_)
                | Action::Await { .. } => Reply::Nothing,
                Action::Drain { seq, .. } => Reply::Drained(seq),
                Action::CatchUp { .. } => Reply::CaughtUp(0),
                Action::Tell { command, .. } => obeyed(&command),
                Action::Ended => panic!("ended early"),
            };
            work.apply(&mut group, &disks(), reply, 1);
        }
        work.begin(&mut group, 1);
        let stored = serde_json::to_vec(&work).unwrap();
        let mut work: Failover = serde_json::from_slice(&stored).unwrap();
        run(&mut work, &mut group, |_| None);
        assert_eq!(work.state, State::Done, "stored at step {crash_at}");
        assert_eq!(work.facts, whole.facts);
        assert_eq!((group.generation, &group.phase), (whole_group.generation, &whole_group.phase));
    }
}

#[test]
fn a_resumed_fence_waits_for_the_source_to_come_back() {
    let (mut work, mut group) = (failover(Choice::Latest, true), group());
    let Action::Tell { connect_ms, .. } = work.begin(&mut group, 1) else { panic!() };
    assert_eq!(connect_ms, 0, "a dead source costs no time");
    let Action::Tell { connect_ms, .. } = work.begin(&mut group, 2) else { panic!() };
    assert!(connect_ms > 0);
}

#[test]
fn what_does_not_fit_is_refused_with_state_and_remedy() {
    let spec = |unconfirmed| Spec { unconfirmed, ..Spec::new(Verb::Failover, Choice::Latest) };
    let protecting = Group { phase: GroupPhase::Protecting, ..group() };
    assert_eq!(check(&spec(false), "", &protecting, 1, true, true, 0), Ok(()));
    assert!(matches!(check(&spec(false), "", &group(), 1, true, true, 0), Err(Problem::State { .. })));
    assert!(matches!(check(&spec(false), "", &protecting, 0, true, true, 0), Err(Problem::State { .. })));
    assert!(matches!(check(&spec(false), "", &protecting, 1, true, false, 0), Err(Problem::Unreachable { .. })));
    let text = check(&spec(false), "", &protecting, 1, false, true, 0).unwrap_err().to_string();
    assert!(text.contains("unconfirmed") && text.contains("src"), "{text}");
    assert!(matches!(check(&spec(true), "shp", &protecting, 1, false, true, 0), Err(Problem::Invalid { .. })));
    assert_eq!(check(&spec(true), "shop", &protecting, 1, false, true, 0), Ok(()));
    let over = Group { phase: GroupPhase::FailedOver { view: "failover".into() }, ..group() };
    assert!(check(&spec(false), "", &over, 1, true, true, 0).unwrap_err().to_string().contains("failed over already"));
}

#[test]
fn a_machine_stored_while_undoing_goes_on_undoing() {
    let no_room = |t: &Tell| matches!(t, Tell::OpenView(_)).then(|| Reply::Answer(error("no room")));
    let (mut whole, mut whole_group) = (failover(Choice::Seq(50), false), group());
    run(&mut whole, &mut whole_group, no_room);
    for step in [StepName::CloseView, StepName::ReturnGeneration, StepName::Release] {
        let (mut work, mut group) = (failover(Choice::Seq(50), false), group());
        // As `run`, until the step has been recorded as running.
        let reached = |w: &Failover| w.steps.iter().any(|s| s.name == step && s.state == StepState::Running);
        while !reached(&work) {
            let reply = match work.begin(&mut group, 1) {
                Action::Tell { command, .. } => match command {
                    Tell::ResolvePoint(_) => Reply::Answer(Outcome::Point(point(50))),
                    Tell::OpenView(_) => Reply::Answer(error("no room")),
                    command => obeyed(&command),
                },
                _ => Reply::Nothing,
            };
            if !reached(&work) {
                work.apply(&mut group, &disks(), reply, 1);
            }
        }
        let stored = serde_json::to_vec(&work).unwrap();
        let mut work: Failover = serde_json::from_slice(&stored).unwrap();
        run(&mut work, &mut group, no_room);
        assert_eq!((work.state, work.error.clone()), (State::Failed, whole.error.clone()), "stored at {step:?}");
        assert_eq!((group.generation, group.writer_generation, group.hold), (3, 3, false));
        assert_eq!(group.phase, GroupPhase::Protecting);
    }
}

#[test]
fn given_up_at_any_step_it_leaves_the_group_protected_or_says_that_it_is_too_late() {
    // Asked for before the step that comes after `steps` others.
    for steps in 0..10 {
        for resumed in [false, true] {
            let (mut work, mut group) = (failover(Choice::Latest, false), group());
            let mut asked = None;
            for now in 10u64.. {
                if now == 10 + steps {
                    if resumed {
                        // The coordinator has begun the step, and is another one now.
                        let _ = work.begin(&mut group, now);
                    }
                    asked = Some(work.cancel("operator/anna"));
                }
                let reply = match work.begin(&mut group, now) {
                    Action::Ended => break,
                    Action::Tell { command, .. } => obeyed(&command),
                    Action::Drain { seq, .. } => Reply::Drained(seq),
                    Action::CatchUp { .. } => Reply::CaughtUp(0),
                    Action::Record
                    | Action::Wait { .. }
                    | Action::Machines(_)
                    | Action::Merge(_)
                    | Action::Await { .. } => Reply::Nothing,
                };
                work.apply(&mut group, &disks(), reply, now);
            }
            match asked {
                Some(Ok(())) => {
                    assert_eq!((work.state, &group.phase), (State::Failed, &GroupPhase::Protecting), "after {steps}");
                    assert!(!group.hold && group.generation == group.writer_generation, "after {steps}");
                    assert!(work.error.as_ref().unwrap().message.contains("operator/anna"));
                }
                Some(Err(_)) | None => assert_eq!(work.state, State::Done, "after {steps}"),
            }
            assert_eq!(work.progress_percent(), 100);
        }
    }
}

#[test]
fn a_lease_that_was_waited_for_when_it_was_given_up_is_not_taken_for_run_out() {
    let spec = Spec::new(Verb::Failover, Choice::Latest);
    let mut work = Failover::new(spec, &[], (FAILOVER_VIEW, ""), 0, 60_000, "ok".into(), 5);
    work.facts.disks = vec!["d1".into()];
    let mut group = group();
    for now in 10.. {
        let reply = match work.begin(&mut group, now) {
            Action::Ended => break,
            Action::Tell { command: Tell::Fence(f), .. } if f.hold => Reply::Unreachable("gone".into()),
            Action::Tell { command: Tell::RaiseGeneration(r), .. } => {
                Reply::Answer(Outcome::Generation(v1::GenerationRaised { generation: r.at_least, zero_loss: false }))
            }
            Action::Wait { .. } => {
                work.cancel("operator/anna").unwrap();
                Reply::Nothing
            }
            Action::Tell { .. } => Reply::Answer(Outcome::Done(v1::Done {})),
            _ => Reply::Nothing,
        };
        work.apply(&mut group, &disks(), reply, now);
    }
    assert_eq!((work.state, &group.phase), (State::Failed, &GroupPhase::Protecting));
    let lease = work.steps.iter().find(|s| s.name == StepName::Lease).unwrap();
    assert_eq!(lease.state, StepState::Failed);
    assert!(!group.hold);
}
