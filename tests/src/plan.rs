//! What happens in one seed: rolled before anything runs, so that it can be printed and cut down.

use afterimage_dataplane::io::Nanos;
use afterimage_dataplane::io::sim::{Rng, WorldConfig};

use crate::stage::Setup;
use crate::workload::Habits;

const MS: Nanos = 1_000_000;
const MIB: u64 = 1 << 20;

/// Something bad.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The source's process dies, or its machine loses power; it comes back after this time.
    Source {
        /// Power, not just the process.
        power: bool,
        /// Until it is started again.
        down: Nanos,
    },
    /// The source is stopped cleanly, and comes back after this time: an upgrade.
    Upgrade {
        /// Until it is started again.
        down: Nanos,
    },
    /// As [`Fault::Source`], of the target.
    Target {
        /// Power, not just the process.
        power: bool,
        /// Until it is started again.
        down: Nanos,
    },
    /// The connection is reset.
    Cut,
    /// The connection is reset, and none can be made for this time.
    Sever(Nanos),
    /// No byte passes for this time, and nobody is told.
    Partition(Nanos),
    /// A restore point is looked at while everything goes on.
    Look,
}

/// How it ends.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Everything is mended and comes to rest.
    Heal,
    /// The source dies for good; the newest point takes over.
    Failover {
        /// Power, not just the process.
        power: bool,
    },
}

/// A whole run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The seed.
    pub seed: u64,
    /// The group.
    pub setup: Setup,
    /// The host.
    pub habits: Habits,
    /// The world.
    pub world: WorldConfig,
    /// How long the host works.
    pub length: Nanos,
    /// What goes wrong, by time since the begin.
    pub faults: Vec<(Nanos, Fault)>,
    /// The end.
    pub ending: Ending,
}

impl Plan {
    /// The plan of a seed.
    pub fn roll(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x005e_ed0f_b1a2);
        let rng = &mut rng;
        let disks = (0..rng.between(1, 3)).map(|_| disk_size(rng)).collect();
        let setup = Setup {
            disks,
            cut_interval: rng.between(10, 200) * MS,
            retention: if rng.chance(0.5) { rng.between(300, 1500) * MS } else { 3600 * 1000 * MS },
            compress: rng.chance(0.8),
            segment_bytes: 6 * MIB,
            budget_bytes: if rng.chance(0.2) { 24 * MIB } else { 1 << 30 },
            trust_reboot: rng.chance(0.5),
            spill_bytes: [0, 8 * MIB, 256 * MIB][rng.below(3) as usize],
        };
        let discard = rng.chance(0.8);
        let habits = Habits {
            discard,
            depth: rng.between(1, 24) as usize,
            pause: rng.between(1, 20) * MS / 2,
            hot: rng.between(2, 60),
            longest: if rng.chance(0.7) { 64 * 1024 } else { 512 * 1024 },
        };
        let disk = rng.between(20, 800) * 1000;
        let net = rng.between(20, 4000) * 1000;
        let world = WorldConfig {
            disk_latency: (disk / 4, disk * rng.between(1, 8)),
            net_latency: (net / 2, net * rng.between(1, 4)),
            net_piece: rng.between(1, 128) as usize * 1024,
            net_window: rng.between(64, 2048) as usize * 1024,
            block: if rng.chance(0.7) { 512 } else { 4096 },
            discard,
            keep_unsynced: [0.0, 0.5, 0.9, 1.0][rng.below(4) as usize],
            land_after_crash: [0.0, 0.5, 1.0][rng.below(3) as usize],
            late: rng.between(1, 1000) * MS,
            ..WorldConfig::default()
        };
        let length = rng.between(500, 3000) * MS;
        let mut faults: Vec<_> = (0..rng.below(7)).map(|_| (rng.between(0, length), fault(rng))).collect();
        faults.sort_by_key(|(at, _)| *at);
        let ending = if rng.chance(0.4) { Ending::Failover { power: rng.chance(0.5) } } else { Ending::Heal };
        Self { seed, setup, habits, world, length, faults, ending }
    }
}

fn disk_size(rng: &mut Rng) -> u64 {
    match rng.below(4) {
        // Several extents of the write-intent log, with a part of one at the end.
        0 => 9 * MIB + rng.below(64) * 4096,
        1 => 4 * MIB,
        _ => rng.between(16, 512) * 4096,
    }
}

fn fault(rng: &mut Rng) -> Fault {
    let down = rng.between(1, 600) * MS;
    match rng.below(12) {
        10 | 11 => Fault::Upgrade { down },
        0 | 1 => Fault::Source { power: rng.chance(0.4), down },
        2 | 3 => Fault::Target { power: rng.chance(0.5), down },
        4 => Fault::Cut,
        5 => Fault::Sever(down),
        6 => Fault::Partition(down),
        _ => Fault::Look,
    }
}
