//! A source that finds its write-intent log changed: it goes by what it can trust, compares the rest, and serves its
//! host.

use std::cell::OnceCell;

use afterimage_dataplane::intent;
use afterimage_wire::intent::{EXTENT, IntentHeader};

use crate::forge;
use crate::input::Input;
use crate::link::{DISK, Machine, SIZE, STREAM};

const MS: u64 = 1_000_000;

thread_local! {
    static BASE: OnceCell<Vec<u8>> = const { OnceCell::new() };
}

/// A log as a source that was killed leaves it.
fn base() -> Vec<u8> {
    BASE.with(|base| {
        base.get_or_init(|| {
            let mut machine = Machine::new();
            assert!(machine.protect(), "a good disk is taken");
            machine.pass(20 * MS);
            machine.welcome();
            machine.pass(50 * MS);
            machine.well();
            machine.log().expect("it has been made")
        })
        .clone()
    })
}

/// The body.
pub fn body(data: &[u8]) {
    let mut input = Input::new(data);
    let mut log = base();
    match input.below(4) {
        0 => log = input.rest().to_vec(),
        1 => {
            // A header of ours with any numbers.
            let mut header = IntentHeader::decode(&log[..4096]).unwrap_or_default();
            (header.disk, header.stream, header.size) = (DISK, STREAM, SIZE);
            header.serial = input.number(header.serial);
            header.acked_frame = input.number(header.acked_frame);
            header.acked_seq = input.number(header.acked_seq);
            header.reserved_seq = input.number(header.reserved_seq);
            header.cut = input.number(header.cut);
            header.sync = input.number(header.sync);
            header.generation = input.number(header.generation);
            (header.whole_owed, header.clean) = (input.flag(), input.flag());
            (header.prior.frame, header.prior.seq) = (input.number(0), input.number(0));
            let at = if input.flag() { 0 } else { 4096 };
            log[at..at + 4096].copy_from_slice(&header.encode());
            if input.byte() > 200 {
                forge::spoil(&mut log, &mut input);
            }
        }
        _ => forge::spoil(&mut log, &mut input),
    }
    let loaded = intent::load(&log, DISK, SIZE, STREAM);
    assert!(loaded.extents.iter().all(|extent| u64::from(*extent) < SIZE.div_ceil(EXTENT)));
    // A size comes from the disk, not from the log; the largest that is quick.
    let _ = intent::load(&log, DISK, input.number(SIZE).min(1 << 40), STREAM);
    let mut machine = Machine::new();
    machine.put_log(&log);
    if machine.protect() {
        machine.pass(20 * MS);
        machine.welcome();
        machine.pass(50 * MS);
        machine.well();
        // What it has made of it is a log.
        if machine.restart(input.flag()) {
            machine.pass(20 * MS);
            machine.welcome();
            machine.pass(50 * MS);
            machine.well();
        }
    }
}
