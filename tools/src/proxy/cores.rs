//! The two cores as the loop of [`super::runtime`] wants them, made from the configuration.

use std::path::PathBuf;

use afterimage_dataplane::io::ring::{Ring, Waker};
use afterimage_dataplane::io::{Class, Done, Nanos};
use afterimage_dataplane::reverse::ReversibleTarget;
use afterimage_dataplane::sealers::Sealer;
use afterimage_dataplane::source::{Source, SourceEvent, SourceLimits, pool_classes};
use afterimage_dataplane::target::{Target, TargetConfig, TargetError, TargetEvent};

use super::config::{DEFAULT_MAX_WAIT_MS, DEFAULT_SPILL, SourceRole, TargetRole};
use super::runtime::{self, Core, DataThread, StartError, ThreadIo};

/// The source core of this proxy.
pub type SourceCore = Source<ThreadIo>;
/// The target core of this proxy.
pub type TargetCore = ReversibleTarget<Ring>;

/// Machine id of a source core.
const SOURCE_ID: u16 = 0x0001;
/// Machine id of the source that captures views.
const CAPTURE_ID: u16 = 0x0002;
/// Machine id of a target core.
const TARGET_ID: u16 = 0x2000;

impl Core for SourceCore {
    type Event = SourceEvent;

    fn done(&mut self, io: &mut ThreadIo, done: Done) {
        Source::done(self, io, done);
    }
    fn turn(&mut self, io: &mut ThreadIo) {
        Source::turn(self, io);
    }
    fn deadline(&self) -> Option<Nanos> {
        Source::deadline(self)
    }
    fn next_event(&mut self) -> Option<SourceEvent> {
        Source::next_event(self)
    }
    fn stop(&mut self, io: &mut ThreadIo) {
        Source::stop(self, io);
    }
    fn is_idle(&self) -> bool {
        Source::is_idle(self)
    }
}

/// What a target core has to say.
pub enum TargetCoreEvent {
    /// Of its streams and views.
    Target(TargetEvent),
    /// Of the views that it captures.
    Source(SourceEvent),
}

impl Core for TargetCore {
    type Event = TargetCoreEvent;

    fn done(&mut self, io: &mut ThreadIo, done: Done) {
        ReversibleTarget::done(self, io, done);
    }
    fn turn(&mut self, io: &mut ThreadIo) {
        ReversibleTarget::turn(self, io);
    }
    fn deadline(&self) -> Option<Nanos> {
        ReversibleTarget::deadline(self)
    }
    fn next_event(&mut self) -> Option<TargetCoreEvent> {
        let own = Target::next_event(self).map(TargetCoreEvent::Target);
        own.or_else(|| self.source.next_event().map(TargetCoreEvent::Source))
    }
    fn stop(&mut self, io: &mut ThreadIo) {
        // Whatever a target has acknowledged is durable; what it has not, the source sends again. The ring finishes what
        // is under way when it is dropped. What is captured of views is another matter.
        self.source.stop(io);
    }
    fn is_idle(&self) -> bool {
        ReversibleTarget::is_idle(self)
    }
}

/// Starts the source's data thread.
///
/// # Errors
/// The kernel lacks what the ring needs.
pub fn start_source(role: &SourceRole) -> Result<DataThread<SourceCore>, StartError> {
    let limits = SourceLimits {
        queue_bytes: usize::try_from(role.queue).unwrap_or(usize::MAX),
        max_wait: role.max_wait_ms * 1_000_000,
        spill_dir: role.spill.as_ref().map_or_else(String::new, |spill| spill.dir.to_string_lossy().into_owned()),
        spill_bytes: role.spill.as_ref().map_or(0, |spill| spill.budget),
        spill_segment_bytes: role.spill.as_ref().map_or(0, |spill| spill.segment),
        spill_reserve_bytes: role.spill.as_ref().map_or(0, |spill| spill.reserve),
        sync_rate: role.sync_rate,
        ..SourceLimits::default()
    };
    let classes = pool_classes(limits.queue_bytes);
    let threads = role.seal_threads;
    runtime::start("source", &classes, move |_, waker: Waker| {
        let sealer = match threads {
            0 => Sealer::Inline,
            threads => Sealer::threads(threads, move || waker.wake()),
        };
        Source::new(SOURCE_ID, limits, sealer)
    })
}

/// Starts the target's data thread.
///
/// # Errors
/// The kernel lacks what the ring needs, or the core refuses its settings.
pub fn start_target(role: &TargetRole) -> Result<DataThread<TargetCore>, TargetStartError> {
    let mut config = TargetConfig::new(role.journal.to_string_lossy());
    config.segment_bytes = role.segment;
    config.reserve_bytes = role.reserve;
    config.scrub_interval = role.scrub_hours * 3_600 * 1_000_000_000;
    config.scrub_rate = role.scrub_rate;
    if let Some(budget) = role.budget {
        config.budget_bytes = budget;
    }
    config.check()?;
    let limits = capture_limits(role);
    let started = runtime::start("target", &target_classes(role.memory), move |_, _| {
        let target = Target::new(TARGET_ID, config).expect("the settings have been checked");
        ReversibleTarget::new(target, Source::new(CAPTURE_ID, limits, Sealer::Inline))
    });
    Ok(started?)
}

/// What is captured of views shares the target's pool and its file system.
fn capture_limits(role: &TargetRole) -> SourceLimits {
    let defaults = SourceLimits::default();
    SourceLimits {
        queue_bytes: usize::try_from(role.memory / 8).unwrap_or(usize::MAX).max(4 << 20),
        max_wait: DEFAULT_MAX_WAIT_MS * 1_000_000,
        spill_dir: outbound(role).join("spill").to_string_lossy().into_owned(),
        spill_bytes: DEFAULT_SPILL,
        spill_reserve_bytes: 2 * role.reserve,
        ..defaults
    }
}

/// Folder, beside the journals, of what a source keeps of the views that it captures.
pub fn outbound(role: &TargetRole) -> PathBuf {
    role.journal.join("outbound")
}

/// Why there is no target.
#[derive(Debug, thiserror::Error)]
pub enum TargetStartError {
    /// No data thread.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Its settings.
    #[error(transparent)]
    Config(#[from] TargetError),
}

/// Buffers for a target with `memory` bytes, by what asks for them: frames received into their place, chunks opened
/// for views, requests of the views' clients (4 KiB before and behind the data). A class that is empty is helped out
/// by the next larger.
fn target_classes(memory: u64) -> Vec<Class> {
    const KIB: usize = 1024;
    // (capacity, share of the memory in percent)
    const SHARES: [(usize, u64); 6] = [
        (8 * KIB, 6),     // reads of 4 KiB, frames with one small write
        (16 * KIB, 10),   // writes of 4 KiB to a view
        (72 * KIB, 16),   // chunks
        (272 * KIB, 16),  // NBD's receive buffers
        (528 * KIB, 20),  // the longest part of a request, 512 KiB
        (2112 * KIB, 32), // the longest frames
    ];
    let count = |capacity: usize, percent: u64| usize::try_from(memory * percent / 100 / capacity as u64);
    SHARES
        .iter()
        .map(|(capacity, percent)| Class {
            capacity: *capacity,
            count: count(*capacity, *percent).unwrap_or(usize::MAX).max(2),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::config::{DEFAULT_POOL, MIN_POOL};

    #[test]
    fn a_targets_pool_keeps_to_its_memory_and_has_every_class() {
        for memory in [MIN_POOL, DEFAULT_POOL] {
            let classes = target_classes(memory);
            let total: usize = classes.iter().map(|c| c.capacity * c.count).sum();
            assert!(total as u64 <= memory && total as u64 > memory * 9 / 10, "{total} of {memory}");
            assert!(classes.iter().all(|c| c.count >= 2 && c.capacity % 4096 == 0));
        }
    }

    #[test]
    fn a_sources_pool_keeps_to_its_memory() {
        let total: usize = pool_classes((DEFAULT_POOL / 2) as usize).iter().map(|c| c.capacity * c.count).sum();
        assert!(total as u64 <= DEFAULT_POOL, "{total}");
    }
}
