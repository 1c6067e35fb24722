//! Criterion benches stand in `benches/`; this library is empty.
