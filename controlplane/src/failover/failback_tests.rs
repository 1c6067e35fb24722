//! The verbs of a failback, step by step, with scripted proxies: each step failing, unanswered, interrupted, given up.

use super::tests::{disks, error, group, obeyed};
use super::*;
use crate::objects::{ExportRecord, Reverse, View, ViewKind};
use crate::problem::Problem;

const AFTER: u64 = 77;

pub(super) fn view() -> View {
    View {
        uid: "v".into(),
        tenant: "default".into(),
        group: "shop".into(),
        id: FAILOVER_VIEW.into(),
        version: 2,
        created_ns: 1,
        kind: ViewKind::Failover,
        writable: true,
        point: PointRecord { seq: 70, disks: vec!["d1".into()], ..PointRecord::default() },
        disk_uids: vec!["d1".into()],
        exports: vec![ExportRecord {
            disk: "data".into(),
            disk_uid: "d1".into(),
            name: "shop.failover/data".into(),
            uris: Vec::new(),
            size: 1,
        }],
        reason: String::new(),
        open: true,
        closing: false,
        request_id: String::new(),
        kept: false,
    }
}

pub(super) fn reverse() -> Reverse {
    let stream_uid = "back".to_owned();
    Reverse { stream_uid, view: FAILOVER_VIEW.into(), generation: 1, writer_generation: 1, hold: false }
}

fn back(verb: Verb) -> Failover {
    let spec = Spec { within_ms: 30_000, ..Spec::new(verb, Choice::Latest) };
    let mut work = Failover::back(spec, &[], &view(), ("back", AFTER), "ok".into(), 5);
    work.facts.disks = vec!["d1".into()];
    work
}

fn undo(unconfirmed: bool) -> Failover {
    let spec = Spec { unconfirmed, ..Spec::new(Verb::UndoFailback, Choice::Latest) };
    let mut work = Failover::new(spec, &[], (FAILOVER_VIEW, ""), 0, 0, "ok".into(), 5).reopening(view().point);
    work.facts.disks = vec!["d1".into()];
    work
}

/// The group as it is when the verb has begun.
fn begun(verb: Verb) -> Group {
    let (operation, view) = ("op".to_owned(), FAILOVER_VIEW.to_owned());
    let over = Group { generation: 2, hold: true, ..group() };
    match verb {
        Verb::Failback => Group { phase: GroupPhase::Changing { operation, view }, ..over },
        Verb::CancelFailback | Verb::SwitchFailback => {
            Group { phase: GroupPhase::Changing { operation, view }, reverse: Some(reverse()), ..over }
        }
        _ => Group {
            phase: GroupPhase::Settling { operation, view, after: AFTER },
            generation: 3,
            writer_generation: 3,
            overwritten: true,
            ..group()
        },
    }
}

/// What both ends may do, as far as they were told and have confirmed.
struct Ground {
    view_open: bool,
    source_free: bool,
}

impl Ground {
    fn of(verb: Verb) -> Self {
        let back = matches!(verb, Verb::CommitFailback | Verb::UndoFailback);
        Self { view_open: !back, source_free: back }
    }

    /// From here on the desired state says so, and the command may be done.
    fn begun(&mut self, work: &Failover, group: &Group, action: &Action) {
        self.source_free |= !group.hold;
        let opens = |name| matches!(name, StepName::OpenView | StepName::ReopenView);
        self.view_open |= work.steps.iter().any(|s| opens(s.name) && s.state == StepState::Running);
        assert!(!(self.view_open && self.source_free), "both may be written at {action:?}: {:?}", work.steps);
    }

    fn answered(&mut self, action: &Action, reply: &Reply) {
        match (action, reply) {
            (Action::Tell { command: Tell::CloseView(_), .. }, Reply::Answer(Outcome::Done(_))) => {
                self.view_open = false;
            }
            (Action::Await { what: Awaited::Held, .. }, Reply::Seen) => self.source_free = false,
            (Action::Tell { side: Side::Source, command: Tell::Fence(f), .. }, Reply::Answer(Outcome::Fenced(_)))
                if f.stream_uid == group().uid =>
            {
                self.source_free = false;
            }
            _ => {}
        }
    }

    /// It has ended: something runs, once, and everything says so.
    fn ends(&self, work: &Failover, group: &Group) {
        assert!(work.ended() && group.phase.operation().is_none(), "{:?}", work.steps);
        assert!(group.generation >= group.writer_generation);
        let at_view = match &group.phase {
            GroupPhase::FailingBack { view } => {
                let reverse = group.reverse.as_ref().expect("the reverse stream goes on");
                assert_eq!((view.as_str(), reverse.hold), (FAILOVER_VIEW, false), "{:?}", work.steps);
                assert_eq!(reverse.generation, reverse.writer_generation, "{:?}", work.steps);
                true
            }
            GroupPhase::FailedOver { .. } => {
                assert!(group.writer_generation < group.generation, "the disks are taken: {:?}", work.steps);
                true
            }
            _ => false,
        };
        assert_eq!((group.hold, self.view_open), (at_view, at_view), "{:?}: {:?}", group.phase, work.steps);
        assert_eq!(group.reverse.is_some(), matches!(group.phase, GroupPhase::FailingBack { .. }));
        if !at_view {
            assert_eq!(group.generation, group.writer_generation);
        }
    }
}

fn does(action: &Action) -> Reply {
    match action {
        Action::CatchUp { .. } => Reply::CaughtUp(0),
        Action::Drain { seq, .. } => Reply::Drained(*seq),
        Action::Merge(_) => merged(true),
        Action::Await { .. } => Reply::Seen,
        Action::Tell { command, .. } => obeyed(command),
        Action::Record | Action::Wait { .. } | Action::Machines(_) | Action::Ended => Reply::Nothing,
    }
}

fn merged(complete: bool) -> Reply {
    let merged_bytes = if complete { 9 } else { 5 };
    Reply::Answer(Outcome::Merged(v1::Merged { complete, merged_bytes, total_bytes: 9, written_bytes: merged_bytes }))
}

/// What may be answered instead.
fn faults(action: &Action) -> Vec<Reply> {
    let gone = Reply::Unreachable("gone".into());
    match action {
        Action::CatchUp { .. } => vec![Reply::CaughtUp(7), gone],
        Action::Drain { seq, .. } => vec![Reply::Drained(seq.saturating_sub(1))],
        Action::Merge(_) => vec![merged(false), Reply::Answer(error("no room")), gone],
        Action::Await { .. } => vec![Reply::NotSeen("nothing".into())],
        Action::Tell { .. } => vec![Reply::Answer(error("in use")), gone],
        Action::Record | Action::Wait { .. } | Action::Machines(_) | Action::Ended => Vec::new(),
    }
}

/// Played to the end. `fault` may answer the action of that number instead of what obeys. What was done.
fn play(work: &mut Failover, group: &mut Group, mut fault: impl FnMut(u64, &Action) -> Option<Reply>) -> Vec<Action> {
    let (mut ground, mut done) = (Ground::of(work.spec.verb), Vec::new());
    for number in 0.. {
        assert!(number < 60, "it does not end: {:?}", work.steps);
        let action = work.begin(group, 10 + number);
        if action == Action::Ended {
            break;
        }
        ground.begun(work, group, &action);
        let reply = fault(number, &action).unwrap_or_else(|| does(&action));
        ground.answered(&action, &reply);
        work.apply(group, &disks(), reply, 10 + number);
        done.push(action);
    }
    ground.ends(work, group);
    done
}

fn told(done: &[Action]) -> Vec<(Side, &Tell)> {
    let tell = |a| match a {
        &Action::Tell { side, ref command, .. } => Some((side, command)),
        _ => None,
    };
    done.iter().filter_map(tell).collect()
}

fn every_verb() -> Vec<(Failover, Group)> {
    use Verb::*;
    let back = |verb| (self::back(verb), begun(verb));
    let undo = |unconfirmed| (self::undo(unconfirmed), begun(UndoFailback));
    vec![back(Failback), back(CancelFailback), back(SwitchFailback), back(CommitFailback), undo(false), undo(true)]
}

#[test]
fn a_failback_begins_once_the_source_has_let_its_disks_go_and_both_have_the_stream() {
    let (mut work, mut group) = (back(Verb::Failback), begun(Verb::Failback));
    let done = play(&mut work, &mut group, |_, _| None);
    assert_eq!((work.state, &group.phase), (State::Done, &GroupPhase::FailingBack { view: FAILOVER_VIEW.into() }));
    assert_eq!(group.reverse, Some(reverse()));
    assert!(matches!(told(&done)[..], [(Side::Source, Tell::ReleaseDisks(r))] if r.stream_uid == group.uid));
    assert!(!group.overwritten && group.leftovers.is_empty());
}

#[test]
fn a_failback_that_does_not_begin_ends_what_it_had_begun() {
    let (mut work, mut shop) = (back(Verb::Failback), begun(Verb::Failback));
    let done = play(&mut work, &mut shop, |_, a| {
        matches!(a, Action::Await { .. }).then(|| Reply::NotSeen("\"src\": no room for a journal".into()))
    });
    assert_eq!(shop.phase, GroupPhase::FailedOver { view: FAILOVER_VIEW.into() });
    let told = told(&done);
    assert!(matches!(told[1], (Side::Target, Tell::Unprotect(u)) if u.stream_uid == "back"), "{told:?}");
    assert!(matches!(told[2], (Side::Source, Tell::DropStream(d)) if d.stream_uid == "back"), "{told:?}");
    assert!(work.error.unwrap().message.contains("no room for a journal"));
    // Disks that are not let go are nobody's base.
    let (mut work, mut group) = (back(Verb::Failback), begun(Verb::Failback));
    let done = play(&mut work, &mut group, |_, a| {
        matches!(a, Action::Tell { .. }).then(|| Reply::Answer(error("a disk hangs")))
    });
    assert_eq!((done.len(), work.error.unwrap().step), (1, StepName::ReleaseDisks));
}

#[test]
fn whoever_could_not_be_told_that_it_is_over_is_noted() {
    let (mut work, mut group) = (back(Verb::CancelFailback), begun(Verb::CancelFailback));
    play(&mut work, &mut group, |_, a| {
        matches!(a, Action::Tell { side: Side::Source, .. }).then(|| Reply::Unreachable("gone".into()))
    });
    assert_eq!((work.state, &group.phase), (State::Done, &GroupPhase::FailedOver { view: FAILOVER_VIEW.into() }));
    let [left] = &group.leftovers[..] else { panic!("{:?}", group.leftovers) };
    assert_eq!((left.stream_uid.as_str(), left.at_target, left.at_source), ("back", false, true));
}

#[test]
fn a_switch_lets_the_source_go_once_the_view_is_closed_and_holds_all_of_it() {
    let (mut work, mut group) = (back(Verb::SwitchFailback), begun(Verb::SwitchFailback));
    let mut asked = 0;
    let done = play(&mut work, &mut group, |_, a| {
        asked += u64::from(matches!(a, Action::Merge(_)));
        (matches!(a, Action::Merge(_)) && asked < 3).then(|| merged(false))
    });
    assert_eq!(asked, 3, "until it is complete");
    assert_eq!(group.phase, GroupPhase::FailedBack { view: FAILOVER_VIEW.into(), after: AFTER });
    assert_eq!((work.state, group.hold, group.overwritten), (State::Done, false, true));
    assert_eq!((group.generation, group.writer_generation), (3, 3));
    let told = told(&done);
    let [fence, raise, leave, end, drop, give] = &told[..] else { panic!("{told:?}") };
    assert!(matches!(fence, (Side::Target, Tell::Fence(f)) if f.hold && f.stream_uid == "back"));
    assert!(matches!(raise, (Side::Source, Tell::RaiseGeneration(r)) if r.at_least == 2 && r.stream_uid == "back"));
    assert!(matches!(leave, (Side::Target, Tell::CloseView(c)) if c.keep_delta && c.view == "shop.failover"));
    assert!(matches!(end, (Side::Target, Tell::Unprotect(u)) if u.stream_uid == "back"));
    assert!(matches!(drop, (Side::Source, Tell::DropStream(d)) if d.stream_uid == "back"));
    assert!(matches!(give, (Side::Target, Tell::RaiseGeneration(r)) if r.at_least == 3 && r.stream_uid == group.uid));
    let drained = done.iter().find(|a| matches!(a, Action::Drain { .. }));
    assert_eq!(drained, Some(&Action::Drain { way: Way::Back, seq: 90, within_ms: 30_000 }));
    let merge = done.iter().find(|a| matches!(a, Action::Merge(_)));
    let all = v1::MergeStream { stream_uid: "back".into(), seq: 90, source_uid: group.uid.clone() };
    assert_eq!(merge, Some(&Action::Merge(all)));
}

#[test]
fn a_switch_that_fails_before_the_view_is_closed_leaves_it_failing_back() {
    let lacks = |a: &Action| matches!(a, Action::Drain { .. }).then_some(Reply::Drained(89));
    let (mut work, mut group) = (back(Verb::SwitchFailback), begun(Verb::SwitchFailback));
    let done = play(&mut work, &mut group, |_, a| lacks(a));
    assert_eq!((work.error.as_ref().unwrap().step, group.overwritten), (StepName::Drain, false));
    assert!(matches!(told(&done)[..], [(_, Tell::Fence(_)), (Side::Target, Tell::Fence(f))] if !f.hold));

    let (mut work, mut group) = (back(Verb::SwitchFailback), begun(Verb::SwitchFailback));
    play(&mut work, &mut group, |_, a| matches!(a, Action::Merge(_)).then(|| Reply::Answer(error("disk full"))));
    assert_eq!(group.phase, GroupPhase::FailingBack { view: FAILOVER_VIEW.into() });
    assert!(group.overwritten, "some of it may have been written");
    assert_eq!(group.reverse.unwrap().writer_generation, 3, "above the one that was raised");
}

#[test]
fn a_source_that_does_not_start_is_held_before_the_view_is_opened_again() {
    let stays = |a: &Action, what| matches!(a, Action::Await { what: w, .. } if *w == what);
    let no = || Some(Reply::NotSeen("disk \"data\" is failed: gone".into()));
    let (mut work, mut group) = (back(Verb::SwitchFailback), begun(Verb::SwitchFailback));
    let done = play(&mut work, &mut group, |_, a| if stays(a, Awaited::Started) { no() } else { None });
    assert_eq!((work.state, &group.phase), (State::Failed, &GroupPhase::FailedOver { view: FAILOVER_VIEW.into() }));
    let told = told(&done);
    let [.., take, reopen] = &told[..] else { panic!("{told:?}") };
    assert!(matches!(take, (Side::Target, Tell::RaiseGeneration(r)) if r.at_least == 4 && r.stream_uid == group.uid));
    assert!(
        matches!(reopen, (Side::Target, Tell::OpenView(o)) if o.view == "shop.failover" && o.seq == 70 && o.writable)
    );
    assert!(group.overwritten, "its failover is not to be undone now");
    // One that does not confirm that may run. So it is what runs.
    let (mut work, mut group) = (back(Verb::SwitchFailback), begun(Verb::SwitchFailback));
    play(&mut work, &mut group, |_, a| matches!(a, Action::Await { .. }).then(|| no().unwrap()));
    let view = FAILOVER_VIEW.to_owned();
    assert_eq!((work.state, &group.phase), (State::Failed, &GroupPhase::FailedBack { view, after: AFTER }));
    assert_eq!(work.error.unwrap().step, StepName::Release);
}

#[test]
fn a_commitment_deletes_what_was_kept_or_changes_nothing() {
    let (mut work, mut group) = (back(Verb::CommitFailback), begun(Verb::CommitFailback));
    let done = play(&mut work, &mut group, |_, _| None);
    assert_eq!((work.state, &group.phase, group.overwritten), (State::Done, &GroupPhase::Protecting, false));
    assert!(
        matches!(told(&done)[..], [(Side::Target, Tell::CloseView(c))] if !c.keep_delta && c.view == "shop.failover")
    );
    let (mut work, mut group) = (back(Verb::CommitFailback), begun(Verb::CommitFailback));
    play(&mut work, &mut group, |_, a| matches!(a, Action::Tell { .. }).then(|| Reply::Unreachable("gone".into())));
    let view = FAILOVER_VIEW.to_owned();
    assert_eq!((&group.phase, group.overwritten), (&GroupPhase::FailedBack { view, after: AFTER }, true));
}

#[test]
fn an_undone_failback_runs_from_its_view_again_and_the_source_is_fenced() {
    for unconfirmed in [false, true] {
        let (mut work, mut shop) = (undo(unconfirmed), begun(Verb::UndoFailback));
        let mut ground = Ground::of(Verb::UndoFailback);
        if unconfirmed {
            // The operator has made sure of it.
            ground.source_free = false;
        }
        let mut told = Vec::new();
        loop {
            let action = work.begin(&mut shop, 1);
            if action == Action::Ended {
                break;
            }
            let gone = unconfirmed && matches!(action, Action::Tell { side: Side::Source, .. });
            let reply = if gone { Reply::Unreachable("gone".into()) } else { does(&action) };
            ground.begun(&work, &shop, &action);
            ground.answered(&action, &reply);
            work.apply(&mut shop, &disks(), reply, 1);
            if let Action::Tell { command, .. } = action {
                told.push(command);
            }
        }
        assert_eq!((work.state, &shop.phase), (State::Done, &GroupPhase::FailedOver { view: FAILOVER_VIEW.into() }));
        assert_eq!((shop.hold, shop.generation, shop.writer_generation, shop.overwritten), (true, 4, 3, true));
        let [Tell::Fence(_), Tell::RaiseGeneration(_), Tell::OpenView(open)] = &told[..] else { panic!("{told:?}") };
        assert_eq!((open.view.as_str(), open.seq), ("shop.failover", 70));
    }
    // As long as it is not fenced nothing is opened.
    let (mut work, mut group) = (undo(false), begun(Verb::UndoFailback));
    let done = play(&mut work, &mut group, |_, a| {
        matches!(a, Action::Tell { command: Tell::Fence(f), .. } if f.hold).then(|| Reply::Unreachable("gone".into()))
    });
    let view = FAILOVER_VIEW.to_owned();
    assert_eq!(group.phase, GroupPhase::FailedBack { view, after: AFTER });
    assert!(!told(&done).iter().any(|(_, t)| matches!(t, Tell::OpenView(_))));
}

/// Each action answered in each other way, and then each later one, too.
#[test]
fn whatever_two_steps_come_to_something_runs_once() {
    let mut ends = std::collections::BTreeSet::new();
    for (work, group) in every_verb().into_iter().filter(|(w, _)| !w.spec.unconfirmed) {
        for first in 0..16 {
            for second in first..24 {
                for (one, other) in (0..3).flat_map(|one| (0..3).map(move |other| (one, other))) {
                    let (mut work, mut group) = (work.clone(), group.clone());
                    play(&mut work, &mut group, |number, action| match number {
                        n if n == first => faults(action).get(one).cloned(),
                        n if n == second => faults(action).get(other).cloned(),
                        _ => None,
                    });
                    ends.insert(format!(
                        "{:?} {:?} {:?}",
                        work.spec.verb,
                        work.state,
                        std::mem::discriminant(&group.phase)
                    ));
                }
            }
        }
    }
    // Each is done; four fail as they were; three more ends are of a source or a view that does not answer.
    assert_eq!(ends.len(), 5 + 4 + 3, "{ends:#?}");
}

/// The coordinator dies before and after each action of each verb, also of those that undo; and somebody gives it up at
/// each.
#[test]
fn stored_or_given_up_at_any_step_it_ends_as_it_would_have() {
    #[derive(Copy, Clone, PartialEq, Debug)]
    enum What {
        DiesBefore,
        DiesAfter,
        GivesUp,
    }
    let fails: [fn(&Action) -> bool; 4] = [
        |_| false,
        |a| matches!(a, Action::Merge(_)),
        |a| matches!(a, Action::Await { what: Awaited::Started | Awaited::Reverse, .. }),
        |a| matches!(a, Action::Tell { command: Tell::DropStream(_), .. }),
    ];
    for (start, shop) in every_verb() {
        for fails in fails {
            let reply = |a: &Action| if fails(a) { faults(a).pop() } else { None };
            // An operator's word is for a source that is gone.
            let lone = start.spec.unconfirmed;
            let (mut whole, mut end) = (start.clone(), shop.clone());
            if !lone {
                play(&mut whole, &mut end, |_, a| reply(a));
            }
            for at in 0..16 {
                for what in [What::DiesBefore, What::DiesAfter, What::GivesUp] {
                    let (mut work, mut group) = (start.clone(), shop.clone());
                    let mut ground = Ground::of(work.spec.verb);
                    ground.source_free &= !lone;
                    let (mut number, mut refused) = (0, false);
                    loop {
                        if number == at && what == What::GivesUp {
                            refused = work.cancel("operator/anna").is_err();
                        }
                        let action = work.begin(&mut group, 1);
                        if action == Action::Ended {
                            break;
                        }
                        ground.begun(&work, &group, &action);
                        let stored = serde_json::to_string(&(&work, &group)).unwrap();
                        let dies = number == at && what != What::GivesUp;
                        number += 1;
                        assert!(number < 60, "{what:?} at {at}: {:?}", work.steps);
                        if dies && what == What::DiesBefore {
                            (work, group) = serde_json::from_str(&stored).unwrap();
                            continue;
                        }
                        let answer = reply(&action).unwrap_or_else(|| does(&action));
                        if dies {
                            // Done, and not recorded: it is done once more.
                            ground.answered(&action, &answer);
                            (work, group) = serde_json::from_str(&stored).unwrap();
                            let again = work.begin(&mut group, 1);
                            assert_eq!(std::mem::discriminant(&again), std::mem::discriminant(&action));
                            ground.begun(&work, &group, &again);
                        }
                        ground.answered(&action, &answer);
                        work.apply(&mut group, &disks(), answer, 1);
                    }
                    ground.ends(&work, &group);
                    if !lone && (what != What::GivesUp || refused) {
                        let verb = work.spec.verb;
                        assert_eq!((work.state, &group), (whole.state, &end), "{verb:?}, {what:?} at {at}");
                    }
                }
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_with_what_does() {
    let of = |phase| Group { phase, ..group() };
    let view = || FAILOVER_VIEW.to_owned();
    let there = Ends { source: true, target: true, source_keeps: true, missing: None };
    let over = of(GroupPhase::FailedOver { view: view() });
    let failing = of(GroupPhase::FailingBack { view: view() });
    let failed = of(GroupPhase::FailedBack { view: view(), after: 1 });
    assert_eq!(check_back(Verb::Failback, &over, &there), Ok(view()));
    assert_eq!(check_back(Verb::SwitchFailback, &failing, &there), Ok(view()));
    assert_eq!(check_back(Verb::CommitFailback, &failed, &there), Ok(view()));
    // Nobody is needed to give it up but who writes.
    let lost = Ends { source: false, ..there.clone() };
    assert_eq!(check_back(Verb::CancelFailback, &failing, &lost), Ok(view()));
    for (verb, group) in [(Verb::Failback, &over), (Verb::SwitchFailback, &failing)] {
        let refused = check_back(verb, group, &lost).unwrap_err();
        assert!(matches!(&refused, Problem::Unreachable { proxy, .. } if proxy == "src"), "{refused}");
    }
    let text = |verb, group: &Group, ends: &Ends| check_back(verb, group, ends).unwrap_err().to_string();
    let plain = Ends { source_keeps: false, ..there.clone() };
    let said = text(Verb::Failback, &over, &plain);
    assert!(said.contains("\"src\"") && said.contains("target.journal") && said.contains("target.listen"), "{said}");
    let early = Ends { missing: Some("synchronising, 5 of 9 bytes".into()), ..there.clone() };
    assert!(text(Verb::SwitchFailback, &failing, &early).contains("5 of 9 bytes"));
    assert!(text(Verb::CommitFailback, &failed, &early).contains("not protected again"));
    let mut untidy = over.clone();
    untidy.leave("old", false, true);
    assert!(text(Verb::Failback, &untidy, &there).contains("\"src\""));
    // Each verb elsewhere.
    assert!(text(Verb::Failback, &of(GroupPhase::Protecting), &there).contains("planned-failover"));
    assert!(text(Verb::Failback, &failing, &there).contains("cancel-failback"));
    assert!(text(Verb::CancelFailback, &over, &there).contains("failback, undo-failover"));
    assert!(text(Verb::SwitchFailback, &failed, &there).contains("undo-failback"));
    let settling = of(GroupPhase::Settling { operation: "op".into(), view: view(), after: 1 });
    assert!(text(Verb::CommitFailback, &settling, &there).contains("operations/op"));
    // And the others' verbs here.
    let planned = Spec::new(Verb::Failover, Choice::Latest);
    let start = |group: &Group| check(&planned, "", group, 1, true, true, 0).unwrap_err().to_string();
    assert!(start(&failing).contains("switch-failback"), "{}", start(&failing));
    assert!(start(&failed).contains("undo-failback") && start(&failed).contains("commit-failback"));
    let undo = Spec::new(Verb::UndoFailback, Choice::Latest);
    assert_eq!(check(&undo, "", &failed, 1, true, true, 0), Ok(()));
    assert!(check(&undo, "", &over, 1, true, true, 0).is_err());
    for verb in [Verb::UndoFailover, Verb::ChangePoint] {
        let refused = check_failed_over(verb, &failing, true, 0, true).unwrap_err().to_string();
        assert!(refused.contains("cancel-failback"), "{refused}");
    }
    let overwritten = Group { overwritten: true, ..over };
    let refused = check_failed_over(Verb::UndoFailover, &overwritten, true, 0, true).unwrap_err().to_string();
    assert!(refused.contains("failback"), "{refused}");
    assert!(check_failed_over(Verb::ChangePoint, &overwritten, true, 0, true).is_ok());
}
