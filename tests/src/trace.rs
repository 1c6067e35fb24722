//! What happened, line by line: printed as it happens, or the last of it kept for when a seed fails.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

use afterimage_dataplane::io::Nanos;

/// Lines that are kept.
const KEPT: usize = 60;

thread_local! {
    static PRINT: Cell<bool> = const { Cell::new(false) };
    static LINES: RefCell<VecDeque<String>> = const { RefCell::new(VecDeque::new()) };
}

/// Begins anew on this thread.
pub fn begin(print: bool) {
    PRINT.set(print);
    LINES.with_borrow_mut(VecDeque::clear);
}

/// Takes a line; `now` is the time of the world.
pub fn line(now: Nanos, what: &str) {
    let what: String = what.chars().take(400).collect();
    let line = format!("{:>10.3} ms  {what}", now as f64 / 1e6);
    if PRINT.get() {
        println!("{line}");
    }
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
