//! Seeds that failed once: `tests/sim --pinned` plays them again. A change of the plan, or of what the code does in them,
//! may make other stories of them; what they showed is in `docs/reliability.md`.

/// In order.
pub const PINNED: &[u64] =
    &[24_484, 24_799, 25_124, 25_417, 27_568, 27_683, 28_237, 28_362, 28_365, 29_028, 29_667, 30_450];
