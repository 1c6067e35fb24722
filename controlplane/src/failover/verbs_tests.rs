//! The verbs beside the plain failover, step by step, with scripted proxies.

use super::tests::{disks, error, group, obeyed, point};
use super::*;

fn planned() -> Failover {
    let spec = Spec { within_ms: 30_000, ..Spec::new(Verb::PlannedFailover, Choice::Latest) };
    let mut work = Failover::new(spec, &[], (FAILOVER_VIEW, ""), 700, 0, "ok".into(), 5);
    work.facts.disks = vec!["d1".into()];
    work
}

/// A group that runs from its view: generation 2 is the view's, 1 its source's.
fn over() -> Group {
    Group { generation: 2, hold: true, phase: changing(), ..group() }
}

fn changing() -> GroupPhase {
    GroupPhase::Changing { operation: "op".into(), view: FAILOVER_VIEW.into() }
}

fn runs_from(view: &str) -> GroupPhase {
    GroupPhase::FailedOver { view: view.into() }
}

fn undo(discard: bool) -> Failover {
    let spec = Spec { discard, ..Spec::new(Verb::UndoFailover, Choice::Latest) };
    let mut work = Failover::new(spec, &[], ("", FAILOVER_VIEW), 0, 0, "ok".into(), 5);
    work.facts.disks = vec!["d1".into()];
    work
}

fn change() -> Failover {
    let spec = Spec::new(Verb::ChangePoint, Choice::Seq(50));
    let mut work = Failover::new(spec, &[], ("failover-2", FAILOVER_VIEW), 0, 0, "ok".into(), 5);
    work.facts.disks = vec!["d1".into()];
    work
}

/// Played to the end; `fault` may answer instead of what obeys. What was told, and whether the source was ever free to go
/// on while the view that is left might be open.
fn play(work: &mut Failover, group: &mut Group, mut fault: impl FnMut(&Action) -> Option<Reply>) -> Vec<Tell> {
    let mut told = Vec::new();
    for now in 10.. {
        let action = work.begin(group, now);
        let left = work.steps.iter().any(|s| s.name == StepName::LeaveView && s.state == StepState::Done);
        assert!(group.hold || left || !work.spec.verb.is_of_failed_over(), "both may write: {:?}", work.steps);
        let reply = fault(&action).unwrap_or_else(|| match &action {
            Action::CatchUp { .. } => Reply::CaughtUp(0),
            Action::Drain { seq, .. } => Reply::Drained(*seq),
            Action::Tell { command, .. } => obeyed(command),
            Action::Record
            | Action::Wait { .. }
            | Action::Machines(_)
            | Action::Merge(_)
            | Action::Await { .. }
            | Action::Ended => Reply::Nothing,
        });
        if let Action::Tell { command, .. } = action.clone() {
            told.push(command);
        }
        if action == Action::Ended {
            break;
        }
        work.apply(group, &disks(), reply, now);
        assert!(now < 50, "the machine does not end");
    }
    told
}

fn refuses(step: impl Fn(&Tell) -> bool) -> impl FnMut(&Action) -> Option<Reply> {
    move |action| match action {
        Action::Tell { command, .. } if step(command) => Some(Reply::Answer(error("in use"))),
        _ => None,
    }
}

#[test]
fn a_planned_failover_takes_all_that_the_source_had() {
    let (mut work, mut group) = (planned(), group());
    let told = play(&mut work, &mut group, |_| None);
    assert_eq!((work.state, &group.phase), (State::Done, &runs_from(FAILOVER_VIEW)));
    assert!(matches!(told[..], [Tell::Fence(_), Tell::RaiseGeneration(_), Tell::ResolvePoint(_), Tell::OpenView(_)]));
    assert_eq!((work.facts.fence, group.generation, group.writer_generation), (Some(FenceKind::Confirmed), 2, 1));
}

#[test]
fn a_planned_failover_that_would_lose_something_lets_the_source_go_on() {
    // What it lacks, by the step at which that is found, and whether I/O was held by then.
    let behind = |action: &Action| matches!(action, Action::CatchUp { .. }).then_some(Reply::CaughtUp(7));
    let silent = |action: &Action| match action {
        Action::Tell { command: Tell::Fence(f), .. } if f.hold => Some(Reply::Unreachable("gone".into())),
        _ => None,
    };
    let rest = |action: &Action| matches!(action, Action::Drain { .. }).then_some(Reply::Drained(89));
    let older = |action: &Action| match action {
        Action::Tell { command: Tell::ResolvePoint(_), .. } => Some(Reply::Answer(Outcome::Point(point(89)))),
        _ => None,
    };
    type Fault = Box<dyn FnMut(&Action) -> Option<Reply>>;
    let cases: [(Fault, StepName, bool); 4] = [
        (Box::new(behind), StepName::CatchUp, false),
        (Box::new(silent), StepName::Fence, true),
        (Box::new(rest), StepName::Drain, true),
        (Box::new(older), StepName::ResolvePoint, true),
    ];
    for (fault, step, held) in cases {
        let (mut work, mut group) = (planned(), group());
        let told = play(&mut work, &mut group, fault);
        assert_eq!((work.state, work.error.as_ref().unwrap().step), (State::Failed, step));
        assert_eq!((group.hold, &group.phase), (false, &GroupPhase::Protecting), "{step:?}");
        assert_eq!(group.generation, group.writer_generation, "{step:?}");
        let let_go = told.iter().any(|t| matches!(t, Tell::Fence(f) if !f.hold));
        assert_eq!(let_go, held, "{step:?}: {told:?}");
    }
}

#[test]
fn an_undone_failover_gives_the_source_the_highest_generation_once_the_view_is_left() {
    for discard in [false, true] {
        let (mut work, mut group) = (undo(discard), over());
        let told = play(&mut work, &mut group, |_| None);
        assert_eq!((work.state, &group.phase), (State::Done, &GroupPhase::Protecting));
        assert_eq!((group.hold, group.generation, group.writer_generation), (false, 3, 3));
        let Tell::CloseView(first) = &told[0] else { panic!("{told:?}") };
        assert!(first.keep_delta, "nothing is deleted before the source goes on");
        assert!(matches!(&told[1], Tell::RaiseGeneration(r) if r.at_least == 3));
        assert!(matches!(&told[2], Tell::Fence(f) if !f.hold));
        assert_eq!(told.len(), if discard { 4 } else { 3 });
        assert!(told[3..].iter().all(|t| matches!(t, Tell::CloseView(c) if !c.keep_delta)));
    }
}

#[test]
fn a_view_that_cannot_be_left_leaves_the_group_as_it_was() {
    let (mut work, mut group) = (undo(true), over());
    let told = play(&mut work, &mut group, refuses(|t| matches!(t, Tell::CloseView(_))));
    assert_eq!((work.state, work.error.as_ref().unwrap().step), (State::Failed, StepName::LeaveView));
    assert_eq!((&group.phase, group.hold, group.generation), (&runs_from(FAILOVER_VIEW), true, 2));
    assert_eq!(told.len(), 1);

    let (mut work, mut group) = (change(), over());
    let old = "shop.failover";
    let told = play(&mut work, &mut group, refuses(|t| matches!(t, Tell::CloseView(c) if c.view == old)));
    assert_eq!((work.state, work.error.as_ref().unwrap().step), (State::Failed, StepName::LeaveView));
    assert_eq!((&group.phase, group.hold), (&runs_from(FAILOVER_VIEW), true));
    let last = told.last().unwrap();
    assert!(matches!(last, Tell::CloseView(c) if c.view == "shop.failover-2" && !c.keep_delta), "{last:?}");
}

#[test]
fn once_the_view_is_left_an_undoing_ends_whoever_is_gone() {
    let (mut work, mut group) = (undo(false), over());
    play(&mut work, &mut group, |action| match action {
        Action::Tell { command: Tell::RaiseGeneration(_) | Tell::Fence(_), .. } => {
            Some(Reply::Unreachable("gone".into()))
        }
        _ => None,
    });
    assert_eq!((work.state, &group.phase, group.hold), (State::Done, &GroupPhase::Protecting, false));
    assert_eq!((group.generation, group.writer_generation), (3, 3), "told by the desired state");
}

#[test]
fn a_changed_point_is_open_before_the_old_view_is_left() {
    let (mut work, mut group) = (change(), over());
    let told = play(&mut work, &mut group, |_| None);
    assert_eq!((work.state, &group.phase, group.hold), (State::Done, &runs_from("failover-2"), true));
    assert!(matches!(&told[1], Tell::OpenView(o) if o.view == "shop.failover-2" && o.seq == 90));
    assert!(matches!(&told[2], Tell::CloseView(c) if c.view == "shop.failover" && c.keep_delta));
    // Back to what was kept: no point is asked for, and what was written there survives a failure.
    let mut work = change().reopening(PointRecord { seq: 70, disks: vec!["d1".into()], ..PointRecord::default() });
    let told = play(&mut work, &mut over(), |_| None);
    assert!(matches!(&told[0], Tell::OpenView(o) if o.seq == 70), "{told:?}");
    let mut work = change().reopening(PointRecord { seq: 70, disks: vec!["d1".into()], ..PointRecord::default() });
    let told = play(&mut work, &mut over(), refuses(|t| matches!(t, Tell::CloseView(c) if c.view == "shop.failover")));
    assert!(matches!(told.last(), Some(Tell::CloseView(c)) if c.view == "shop.failover-2" && c.keep_delta), "{told:?}");
}

/// The coordinator dies before and after each action of each verb; and somebody gives it up at each.
#[test]
fn stored_or_given_up_at_any_step_it_ends_as_done_or_as_it_was() {
    for (work, group) in [(planned(), group()), (undo(false), over()), (undo(true), over()), (change(), over())] {
        let (work, group) = (|| work.clone(), || group.clone());
        let (mut whole, mut end) = (work(), group());
        play(&mut whole, &mut end, |_| None);
        for at in 0..whole.steps.len() as u64 {
            for (cancels, applied) in [(false, false), (false, true), (true, false), (true, true)] {
                let (mut work, mut group) = (work(), group());
                let mut acted = 0;
                let mut refused = false;
                loop {
                    let action = work.begin(&mut group, 1);
                    if action == Action::Ended {
                        break;
                    }
                    let stored = serde_json::to_string(&(&work, &group)).unwrap();
                    if acted == at {
                        acted += 1;
                        if cancels {
                            refused = work.cancel("operator/anna").is_err();
                        } else if !applied {
                            (work, group) = serde_json::from_str(&stored).unwrap();
                            continue;
                        }
                    } else {
                        acted += 1;
                    }
                    let reply = match &action {
                        Action::CatchUp { .. } => Reply::CaughtUp(0),
                        Action::Drain { seq, .. } => Reply::Drained(*seq),
                        Action::Tell { command, .. } => obeyed(command),
                        _ => Reply::Nothing,
                    };
                    if acted == at + 1 && applied && !cancels {
                        // What was answered is not recorded: the action is done once more.
                        (work, group) = serde_json::from_str(&stored).unwrap();
                        assert_eq!(std::mem::discriminant(&work.begin(&mut group, 1)), std::mem::discriminant(&action));
                    }
                    work.apply(&mut group, &disks(), reply, 1);
                }
                let verb = work.spec.verb;
                if !cancels || refused {
                    assert_eq!((work.state, &group), (State::Done, &end), "{verb:?} at {at}");
                } else if work.state == State::Failed {
                    let was = if verb.is_of_failed_over() { runs_from(FAILOVER_VIEW) } else { GroupPhase::Protecting };
                    assert_eq!((&group.phase, group.hold), (&was, verb.is_of_failed_over()), "{verb:?} at {at}");
                } else {
                    assert_eq!((work.state, &group.phase), (State::Done, &end.phase), "{verb:?} at {at}");
                }
            }
        }
    }
}

#[test]
fn verbs_for_a_group_that_is_failed_over_say_what_fits_elsewhere() {
    let of = |phase| Group { phase, ..group() };
    let check = |verb, phase, connected, hosts, force| check_failed_over(verb, &of(phase), connected, hosts, force);
    assert_eq!(check(Verb::UndoFailover, runs_from("failover-2"), true, 0, false), Ok("failover-2".into()));
    let text = |phase| check(Verb::UndoFailover, phase, true, 0, false).unwrap_err().to_string();
    assert!(text(GroupPhase::Protecting).contains("planned-failover"));
    assert!(text(changing()).contains("operations/op"));
    assert!(text(GroupPhase::FailingOver { operation: "x".into() }).contains("operations/x"));
    assert!(text(GroupPhase::Deleting).contains("deleted"));
    let away = check(Verb::UndoFailover, runs_from("failover"), false, 0, false).unwrap_err().to_string();
    assert!(away.contains("not connected"), "{away}");
    let busy = check(Verb::ChangePoint, runs_from("failover"), true, 2, false).unwrap_err().to_string();
    assert!(busy.contains("2 hosts") && busy.contains("force"), "{busy}");
    assert!(check(Verb::ChangePoint, runs_from("failover"), true, 2, true).is_ok());
    let planned = Spec::new(Verb::PlannedFailover, Choice::Latest);
    let text = super::check(&planned, "", &of(GroupPhase::Protecting), 1, false, true, 9).unwrap_err().to_string();
    assert!(text.contains("handed over") && text.contains("src"), "{text}");
}
