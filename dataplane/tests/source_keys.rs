//! A policy key is rotated while a source runs: a new writer under it, nothing sent again, what is older still opens.

#[path = "source/bed.rs"]
#[allow(dead_code)]
mod bed;

use afterimage_dataplane::seal::{DataKey, PolicyKey};
use afterimage_wire::ids::{IncarnationId, PolicyKeyId};
use afterimage_wire::record::RecordKind;
use bed::{Bed, MS, STREAM, policy, rotated};

fn is_under(bed: &Bed, key: &PolicyKey) -> bool {
    bed.held.hellos.last().is_some_and(|hello| hello.key.policy_key == key.id)
}

#[test]
fn older_keys_open_and_only_the_newest_wraps() {
    let writer = IncarnationId([9; 16]);
    let old = policy().wrap(writer, &DataKey::new([7; 32]), [1; 12]);
    assert!(rotated().unwrap(writer, &old).is_ok());
    let new = rotated().wrap(writer, &DataKey::new([7; 32]), [2; 12]);
    assert_eq!(new.policy_key, rotated().id);
    assert!(rotated().unwrap(writer, &new).is_ok() && policy().unwrap(writer, &new).is_err());
    assert!(PolicyKey::new(PolicyKeyId([3; 16]), [2; 32]).unwrap(writer, &old).is_err());
}

#[test]
fn the_next_writer_is_under_the_next_key_and_nothing_is_sent_again() {
    let mut bed = Bed::usual(2);
    bed.ready();
    bed.write(0, 8192, &[7; 4096]).unwrap();
    bed.acked();
    let (first, begun) = (bed.status(), bed.held.count(RecordKind::SyncBegin));
    let sent = bed.held.count(RecordKind::SyncWrite) + bed.held.count(RecordKind::SyncZero);
    bed.source.set_policy_key(&mut bed.io, STREAM, rotated());
    bed.until("under the next key", |bed| is_under(bed, &rotated()) && bed.is_protected());
    let hello = bed.held.hellos.last().unwrap();
    assert_eq!(hello.key.policy_key, rotated().id);
    // It goes on from the last place of the one before, which the target holds.
    assert_eq!(hello.predecessor.incarnation, first.incarnation);
    bed.write(1, 16384, &[8; 4096]).unwrap();
    bed.acked();
    bed.assert_equal();
    assert_eq!(bed.held.count(RecordKind::SyncBegin), begun, "a synchronisation");
    assert_eq!(bed.held.count(RecordKind::SyncWrite) + bed.held.count(RecordKind::SyncZero), sent, "sent again");
    // Told the same again it does nothing.
    let links = bed.links();
    bed.source.set_policy_key(&mut bed.io, STREAM, rotated());
    for _ in 0..200 {
        bed.step();
    }
    assert_eq!(bed.links(), links);
}

#[test]
fn what_is_on_its_way_is_waited_for() {
    let mut bed = Bed::usual(1);
    bed.ready();
    let before = bed.status().incarnation;
    bed.unreachable = true;
    bed.source.cut_off(&mut bed.io, STREAM, "the test cuts it");
    bed.write(0, 8192, &[7; 4096]).unwrap();
    bed.source.set_policy_key(&mut bed.io, STREAM, rotated());
    let until = bed.world.now() + 3000 * MS;
    while bed.world.now() < until {
        bed.step();
    }
    assert_eq!(
        bed.status().incarnation,
        before,
        "records that are on their way belong to the writer that numbered them"
    );
    bed.unreachable = false;
    bed.until("under the next key", |bed| is_under(bed, &rotated()) && bed.is_protected());
    bed.acked();
    bed.assert_equal();
    assert_eq!(bed.held.count(RecordKind::SyncBegin), 1, "only the first synchronisation");
}

#[test]
fn a_restart_begins_under_the_next_key_and_compares_by_it() {
    let mut bed = Bed::usual(1);
    bed.ready();
    bed.write(0, 8192, &[7; 4096]).unwrap();
    bed.acked();
    bed.world.power_loss(bed.node);
    bed.policy = rotated();
    bed.restart();
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    bed.assert_equal();
    assert_eq!(bed.held.hellos.last().unwrap().key.policy_key, rotated().id);
    // Hashes of both ends are by the same key: what is equal is not sent.
    assert!(bed.held.count(RecordKind::SyncHash) > 0);
}
