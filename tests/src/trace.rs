//! What happened, line by line: printed as it happens, or the last of it kept for when a seed fails.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

use afterimage_dataplane::io::Nanos;

/// Lines that are kept.
const KEPT: usize = 60;
/// Of the hash over all lines (FNV-1a).
const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
const PRIME: u64 = 0x0000_0100_0000_01b3;

thread_local! {
    static PRINT: Cell<bool> = const { Cell::new(false) };
    static LINES: RefCell<VecDeque<String>> = const { RefCell::new(VecDeque::new()) };
    static HASH: Cell<u64> = const { Cell::new(BASIS) };
}

/// Begins anew on this thread.
pub fn begin(print: bool) {
    PRINT.set(print);
    LINES.with_borrow_mut(VecDeque::clear);
    HASH.set(BASIS);
}

/// Takes a line; `now` is the time of the world.
pub fn line(now: Nanos, what: &str) {
    let what: String = what.chars().take(400).collect();
    let line = format!("{:>10.3} ms  {what}", now as f64 / 1e6);
    if PRINT.get() {
        println!("{line}");
    }
    HASH.set(line.bytes().fold(HASH.get(), |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME)));
    LINES.with_borrow_mut(|lines| {
        if lines.len() == KEPT {
            lines.pop_front();
        }
        lines.push_back(line);
    });
}

/// The last lines since [`begin`].
pub fn last() -> Vec<String> {
    LINES.with_borrow(|lines| lines.iter().cloned().collect())
}

/// A hash of all lines since [`begin`]: a change of the simulator that must not change what seeds do leaves it as it was.
pub fn hash() -> u64 {
    HASH.get()
}
