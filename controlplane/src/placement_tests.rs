//! Where groups go, and never go.

use proptest::prelude::*;

use super::*;

const GIB: u64 = 1 << 30;

fn candidate(id: &str, site: &str, free: u64) -> Candidate {
    Candidate {
        id: id.into(),
        site: site.into(),
        connected: true,
        takes_streams: true,
        room: Some(Room { total: 1000 * GIB, free: free * GIB, reserve: 10 * GIB, default_budget: 16 * GIB }),
        ..Candidate::default()
    }
}

fn need(disks: u64) -> Need {
    Need { disks: disks * GIB, source: "src".into(), site: "vienna".into(), ..Need::default() }
}

#[test]
fn the_least_full_is_taken_and_the_numbers_are_said() {
    let found = place(&need(100), &[candidate("a", "graz", 400), candidate("b", "linz", 700)]);
    assert_eq!(found.target.as_deref(), Some("b"));
    assert!(found.reason.starts_with("\"b\": 116.0 GiB needed, 690.0 GiB left"), "{}", found.reason);
    assert!(found.reason.contains("41.6% full"), "{}", found.reason);
}

#[test]
fn among_equally_full_ones_the_least_loaded_is_taken() {
    let busy = Candidate { wire_per_s: 1 << 20, ..candidate("a", "", 700) };
    let crowded = Candidate { groups: 3, ..candidate("b", "", 700) };
    let all = [busy, crowded, candidate("c", "", 690), candidate("d", "", 690)];
    assert_eq!(place(&need(1), &all).target.as_deref(), Some("c"));
    assert_eq!(place(&need(1), &all[..2]).target.as_deref(), Some("b"));
}

#[test]
fn the_sources_own_site_is_taken_only_if_that_is_allowed() {
    let all = [candidate("near", "vienna", 900), candidate("far", "graz", 300)];
    assert_eq!(place(&need(1), &all).target.as_deref(), Some("far"));
    assert!(place(&need(1), &all).reason.contains("the source's own site \"vienna\""));
    assert_eq!(place(&Need { same_site: true, ..need(1) }, &all).target.as_deref(), Some("near"));
    // Of a source whose site nobody knows nothing can be said.
    assert_eq!(place(&Need { site: String::new(), ..need(1) }, &all).target.as_deref(), Some("near"));
}

#[test]
fn what_fits_nowhere_is_refused_with_the_numbers() {
    let gone = Candidate { connected: false, ..candidate("gone", "", 900) };
    let silent = Candidate { room: None, ..candidate("silent", "", 900) };
    let leaving = Candidate { draining: true, ..candidate("leaving", "", 900) };
    let full = Candidate { promised: 80 * GIB, ..candidate("full", "", 100) };
    let found = place(&need(20), &[gone, silent, leaving, full, candidate("src", "", 900)]);
    assert_eq!(found.target, None);
    for part in ["not connected", "how much room", "drained", "it is the source", "\"full\": short of 26.0 GiB"] {
        assert!(found.reason.contains(part), "{part}: {}", found.reason);
    }
    assert!(place(&need(1), &[]).reason.contains("no proxy"));
}

#[test]
fn a_policys_own_budget_counts_instead_of_the_targets() {
    let own = Need { budget: 2 * GIB, ..need(80) };
    assert_eq!(place(&own, &[candidate("a", "", 92)]).target.as_deref(), Some("a"));
    assert_eq!(place(&need(80), &[candidate("a", "", 92)]).target, None);
}

fn any_candidate() -> impl Strategy<Value = Candidate> {
    let flags = (prop::bool::weighted(0.8), prop::bool::weighted(0.9), prop::bool::weighted(0.1));
    let site = prop::sample::select(vec!["", "a", "b"]);
    let room = prop::option::weighted(0.9, (0u64..200, 0u64..200, 0u64..20, 0u64..8));
    (0u8..40, site, flags, room, 0u64..100, 0u32..9, 0u64..1 << 30).prop_map(
        |(id, site, (connected, takes_streams, draining), room, promised, groups, wire_per_s)| Candidate {
            id: format!("p{id}"),
            site: site.into(),
            connected,
            takes_streams,
            draining,
            room: room.map(|(total, free, reserve, default_budget)| Room {
                total: total.max(free),
                free,
                reserve,
                default_budget,
            }),
            promised,
            groups,
            wire_per_s,
        },
    )
}

fn any_need() -> impl Strategy<Value = Need> {
    let site = prop::sample::select(vec!["", "a", "b"]);
    (1u64..60, 0u64..10, 0u8..40, site, any::<bool>()).prop_map(|(disks, budget, source, site, same_site)| Need {
        disks,
        budget,
        source: format!("p{source}"),
        site: site.into(),
        same_site,
        avoid: Vec::new(),
    })
}

fn fleet() -> impl Strategy<Value = Vec<Candidate>> {
    prop::collection::vec(any_candidate(), 0..12).prop_map(|mut all| {
        all.sort_by(|a, b| a.id.cmp(&b.id));
        all.dedup_by(|a, b| a.id == b.id);
        all
    })
}

proptest! {
    /// Groups that come one after the other never take more than there is, and go to nobody who may not have them; no group
    /// that has been placed is moved by what comes later, nor by a target that is added.
    #[test]
    fn never_over_capacity(mut fleet in fleet(), needs in prop::collection::vec(any_need(), 1..20)) {
        let before = fleet.clone();
        for need in needs {
            let found = place(&need, &fleet);
            let could = fleet.iter().any(|c| judge(&need, c).0);
            prop_assert_eq!(found.target.is_some(), could);
            let Some(target) = found.target else { continue };
            let chosen = fleet.iter_mut().find(|c| c.id == target).unwrap();
            let room = chosen.room.unwrap();
            prop_assert!(chosen.connected && chosen.takes_streams && !chosen.draining && target != need.source);
            prop_assert!(need.same_site || need.site.is_empty() || chosen.site != need.site);
            chosen.promised += need.bytes(room);
            chosen.groups += 1;
            prop_assert!(chosen.promised + room.reserve <= room.free);
        }
        for (was, is) in before.iter().zip(&fleet) {
            prop_assert!(is.promised >= was.promised && is.groups >= was.groups);
        }
    }

    /// The same whatever the order in which candidates are named.
    #[test]
    fn deterministic((fleet, shuffled) in fleet().prop_flat_map(|f| (Just(f.clone()), Just(f).prop_shuffle())), need in any_need()) {
        prop_assert_eq!(place(&need, &fleet), place(&need, &shuffled));
    }

    /// When a target is left, each of its groups goes to another one, and a candidate that is worse changes nothing.
    #[test]
    fn minimal_movement(fleet in fleet(), need in any_need()) {
        let Some(first) = place(&need, &fleet).target else { return Ok(()) };
        let without = Need { avoid: vec![first.clone()], ..need.clone() };
        prop_assert_ne!(place(&without, &fleet).target, Some(first.clone()));
        for other in fleet.iter().filter(|c| c.id != first) {
            let rest: Vec<Candidate> = fleet.iter().filter(|c| c.id != other.id).cloned().collect();
            prop_assert_eq!(place(&need, &rest).target, Some(first.clone()));
        }
    }
}
