//! What happens in one seed: rolled before anything runs, so that it can be printed and cut down.

use afterimage_dataplane::io::Nanos;
use afterimage_dataplane::io::sim::{Errors, Rng, WorldConfig};

use crate::front::Front;
use crate::stage::Setup;
use crate::workload::Habits;

const MS: Nanos = 1_000_000;
const MIB: u64 = 1 << 20;

/// One of the two ends.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Side {
    /// The source's machine.
    Source,
    /// The target's machine.
    Target,
}

/// Something that happens by itself, and just after which a fault bites most.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Moment {
    /// A connection has been made.
    Linked,
    /// A synchronisation has begun.
    SyncBegun,
    /// The end of a synchronisation is drawn, and not acknowledged yet.
    SyncDrawn,
    /// The floor is being raised: the oldest segment is folded.
    Folding,
    /// A folded segment has been dropped.
    Folded,
    /// A file has appeared that is to become a segment: of the target's journal, or of the source's spill.
    Made,
}

/// Something bad.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// A process dies, or its machine loses power; it comes back after this time.
    Fall {
        /// Whose.
        side: Side,
        /// Power, not just the process.
        power: bool,
        /// Until it is started again.
        down: Nanos,
    },
    /// As a fall of the source, at a moment of its host's: when it has just begun to work, or rests longest.
    FallWhen {
        /// It has just begun to work.
        wakes: bool,
        /// Power, not just the process.
        power: bool,
        /// Until it is started again.
        down: Nanos,
    },
    /// This goes wrong so long before the host next goes to rest, or begins to work.
    Before {
        /// It begins to work.
        wakes: bool,
        /// How long before.
        lead: Nanos,
        /// What.
        fault: Box<Fault>,
    },
    /// One write to this disk of the source takes that much longer; shortly before it would end, the process dies, if
    /// `falls`.
    Hang {
        /// The disk.
        disk: usize,
        /// A write to its write-intent log, not to itself.
        log: bool,
        /// How much longer.
        time: Nanos,
        /// The process dies over it.
        falls: bool,
    },
    /// The source is stopped cleanly, and started again after this time.
    Stop {
        /// Until it is started again.
        down: Nanos,
    },
    /// As a fall with loss of power (or a clean stop), and somebody writes to the source's disks meanwhile.
    Foreign {
        /// Stopped cleanly, not by a loss of power.
        clean: bool,
        /// Until it is started again.
        down: Nanos,
    },
    /// The connection is reset.
    Cut,
    /// The connection is reset, and none can be made for this time.
    Sever(Nanos),
    /// No byte passes for this time, and nobody is told.
    Partition(Nanos),
    /// No byte passes from this side for this time, and nobody is told.
    OneWay(Side, Nanos),
    /// The disk of this side does nothing for this time.
    Stall(Side, Nanos),
    /// The process of this side stands still for this time; its machine's monotonic clock, too, if it sleeps.
    Suspend {
        /// Which.
        side: Side,
        /// How long.
        time: Nanos,
        /// The whole machine sleeps.
        sleeps: bool,
    },
    /// The wall clock of this side jumps by that many nanoseconds.
    Jump(Side, i64),
    /// Operations of this side's disk fail for this time.
    Errors(Side, Errors, Nanos),
    /// The target's disk is full for this time.
    Full(Nanos),
    /// Bits of a frame in the target's journal flip; it is a frame that others name as acknowledged, if `proved`.
    Rot {
        /// Later frames prove that it was durable.
        proved: bool,
    },
    /// The next write to the target's journal goes astray, or nowhere.
    Misdirect {
        /// Nowhere.
        lost: bool,
    },
    /// Somebody takes a copy of the target's disk.
    Copy,
    /// The target's machine loses power, and comes back after this time with the copy taken last as its disk.
    Rollback {
        /// Until it is started again.
        down: Nanos,
        /// The source's process dies, too, and comes back earlier.
        both: bool,
    },
    /// Several things go wrong together.
    Many(Vec<Fault>),
    /// This goes wrong so much later.
    After(Nanos, Box<Fault>),
    /// This goes wrong when that has happened, after at most this time.
    When {
        /// After what.
        moment: Moment,
        /// How long after it, at most.
        within: Nanos,
        /// What.
        fault: Box<Fault>,
    },
    /// The policy is changed: at once if the source runs, and for every later life of it.
    Policy {
        /// As [`Setup::sync_deadline`].
        sync_deadline: Nanos,
        /// As [`Setup::cut_interval`].
        cut_interval: Nanos,
        /// As [`Setup::compress`].
        compress: bool,
    },
    /// The lease that the policy asks for is another from now on: of the source that runs, and of every later life of it.
    Lease(Nanos),
    /// A restore point is looked at while everything goes on.
    Look,
    /// A restore point is opened, and looked at only after this time.
    Hold(Nanos),
}

impl Fault {
    /// It may take from the target what it has acknowledged: then the target need not have it, but must not lie.
    pub fn harms_history(&self) -> bool {
        match self {
            Self::When { fault, .. } | Self::Before { fault, .. } | Self::After(_, fault) => fault.harms_history(),
            Self::Many(faults) => faults.iter().any(Self::harms_history),
            Self::Rot { .. } | Self::Misdirect { .. } | Self::Rollback { .. } => true,
            _ => false,
        }
    }

    /// Requests of the host may fail.
    pub fn fails_requests(&self) -> bool {
        matches!(self, Self::Errors(Side::Source, ..))
    }

    /// Storage may fail or lie.
    pub fn is_of_storage(&self) -> bool {
        self.harms_history() || matches!(self, Self::Errors(..) | Self::Full(_))
    }
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
    /// The source is fenced while it works: the target raises the generation under it.
    Fence,
    /// A coordinator fails over, whatever goes on.
    Coordinated,
}

/// What kind of trouble prevails.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Theme {
    /// Deaths, losses of power and cuts, as they come.
    Mixed,
    /// The source falls again and again, with pauses in which its log is cleared.
    Cycles,
    /// The link is away for long.
    Outage,
    /// The target's disk is bad.
    BadTarget,
    /// The source's disk is bad.
    BadSource,
    /// Clocks, sleeps, slow disks.
    Clocks,
    /// Faults just after something has happened.
    Moments,
    /// History is short: folding goes on all the time, under views that are held.
    Folding,
    /// Nothing but the source's logs, or what it names of them, tells what the target lacks; then all is quiet.
    Doubt,
}

impl std::str::FromStr for Theme {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        use Theme::*;
        let all = [Mixed, Cycles, Outage, BadTarget, BadSource, Clocks, Moments, Folding, Doubt];
        let found = all.into_iter().find(|theme| format!("{theme:?}").eq_ignore_ascii_case(name));
        found.ok_or_else(|| {
            format!(
                "`{name}` is none of mixed, cycles, outage, badtarget, badsource, clocks, moments, folding, \
                 doubt"
            )
        })
    }
}

/// A whole run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The seed.
    pub seed: u64,
    /// Its kind.
    pub theme: Theme,
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
        let theme = match rng.below(24) {
            0..=5 => Theme::Mixed,
            6..=10 => Theme::Cycles,
            11..=12 => Theme::Outage,
            13..=15 => Theme::BadTarget,
            16 => Theme::BadSource,
            17..=18 => Theme::Clocks,
            19..=21 => Theme::Moments,
            _ => Theme::Folding,
        };
        let cycles = theme == Theme::Cycles;
        let large = matches!(theme, Theme::Cycles | Theme::BadTarget | Theme::Outage);
        let disks = (0..rng.between(1, 3)).map(|_| disk_size(rng, large)).collect();
        let retention = match rng.below(6) {
            _ if theme == Theme::Folding => rng.between(300, 1200) * MS,
            0 | 1 => rng.between(300, 1500) * MS,
            2 => 5000 * MS,
            _ => 3600 * 1000 * MS,
        };
        let small = rng.chance(0.2) && theme != Theme::BadTarget;
        let setup = Setup {
            disks,
            cut_interval: rng.between(10, 200) * MS,
            retention,
            compress: rng.chance(0.8),
            segment_bytes: 6 * MIB,
            budget_bytes: if small { 24 * MIB } else { 1 << 30 },
            trust_reboot: rng.chance(if cycles { 0.65 } else { 0.5 }),
            hot_extents: if cycles { 0 } else { rng.below(3) as usize },
            spill_bytes: [0, 8 * MIB, 256 * MIB][rng.below(3) as usize],
            lease: 0,
            confirmed: false,
            sync_deadline: 0,
            front: Front::Direct,
            view_front: Front::Direct,
        };
        let discard = rng.chance(0.8);
        // Bursts leave time in which extents grow cold.
        let (work, idle) = match theme {
            Theme::Cycles => (rng.between(50, 700) * MS, rng.between(2500, 5500) * MS),
            Theme::Folding => (rng.between(50, 300) * MS, rng.between(300, 1200) * MS),
            _ if rng.chance(if theme == Theme::BadTarget { 0.5 } else { 0.2 }) => {
                (rng.between(100, 500) * MS, rng.between(100, 2000) * MS)
            }
            _ => (Nanos::MAX, 0),
        };
        let habits = Habits {
            discard,
            depth: rng.between(1, 24) as usize,
            pause: rng.between(1, if theme == Theme::Outage { 4 } else { 20 }) * MS / 2,
            favours: rng.chance(0.3),
            hot: rng.between(2, 60),
            longest: if rng.chance(0.7) { 64 * 1024 } else { 512 * 1024 },
            flushes: if cycles { rng.between(1, 10) } else { 10 },
            unit: 1,
            work,
            idle,
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
        let length = if idle > 0 { rng.between(3000, 9000) * MS } else { rng.between(500, 3000) * MS };
        let mut faults: Vec<_> = (0..rng.below(7)).map(|_| (rng.between(0, length), fault(rng, theme))).collect();
        if theme == Theme::Moments {
            // What is armed at the begin meets the first synchronisation, which is a whole one.
            faults.iter_mut().for_each(|(at, _)| *at = if rng.chance(0.4) { 0 } else { *at });
        }
        faults.sort_by_key(|(at, _)| *at);
        let ending = match rng.below(20) {
            0..=4 => Ending::Failover { power: rng.chance(0.5) },
            5..=6 => Ending::Fence,
            7..=8 => Ending::Coordinated,
            _ => Ending::Heal,
        };
        let mut plan = Self { seed, theme, setup, habits, world, length, faults, ending };
        plan.wait();
        plan.harm();
        plan.doubt();
        plan.prepare();
        plan.front();
        plan.policies();
        plan.leases();
        plan
    }

    /// Some policies let hosts wait: for a word (then links are away for longer than a lease), for the acknowledgement.
    fn wait(&mut self) {
        let mut rng = Rng::new(self.seed ^ 0x001e_a5e5);
        let rng = &mut rng;
        if rng.chance(0.18) {
            self.setup.sync_deadline = rng.between(200, 2500) * MS;
        }
        if !rng.chance(0.12) {
            return;
        }
        self.setup.lease = rng.between(3000, 5000) * MS;
        self.setup.confirmed = rng.chance(0.4);
        if self.habits.idle == 0 {
            (self.habits.work, self.habits.idle) = (rng.between(50, 300) * MS, rng.between(300, 1500) * MS);
        }
        self.length = self.length.max(rng.between(4000, 9000) * MS);
        for _ in 0..rng.between(1, 2) {
            let side = if rng.chance(0.5) { Side::Source } else { Side::Target };
            let (time, down) = (rng.between(1000, 7000) * MS, rng.between(1, 600) * MS);
            let fault = match rng.below(6) {
                0 => Fault::Sever(time),
                1 => Fault::Partition(time),
                2 => Fault::OneWay(side, time),
                3 => Fault::Suspend { side: Side::Source, time, sleeps: rng.chance(0.6) },
                4 => Fault::Fall { side: Side::Source, power: rng.chance(0.6), down },
                _ => Fault::Fall { side: Side::Target, power: rng.chance(0.5), down: time },
            };
            self.faults.push((rng.below(self.length), fault));
        }
        self.faults.sort_by_key(|(at, _)| *at);
    }

    /// Something in it may take from the target what it has acknowledged.
    pub fn harms_history(&self) -> bool {
        self.faults.iter().any(|(_, fault)| fault.harms_history())
    }

    /// Something in it makes requests of the host fail.
    pub fn fails_requests(&self) -> bool {
        self.faults.iter().any(|(_, fault)| fault.fails_requests())
    }

    /// Answers may wait for the target at some time.
    pub fn may_hold_answers(&self) -> bool {
        let policy = |(_, fault): &(Nanos, Fault)| matches!(fault, Fault::Policy { .. } | Fault::Many(_));
        self.setup.sync_deadline > 0 || self.faults.iter().any(policy)
    }

    /// Storage in it may fail or lie.
    pub fn lenient(&self) -> bool {
        self.faults.iter().any(|(_, fault)| fault.is_of_storage())
    }

    /// On some bad disks of a target frames of the journal rot, and writes go astray.
    fn harm(&mut self) {
        let mut rng = Rng::new(self.seed ^ 0x0bad_da7a);
        if self.theme == Theme::BadTarget && rng.chance(0.4) {
            for _ in 0..rng.between(1, 3) {
                let fault = match rng.below(3) {
                    0 => Fault::Misdirect { lost: rng.chance(0.5) },
                    _ => Fault::Rot { proved: rng.chance(0.7) },
                };
                self.faults.push((rng.between(0, self.length), fault));
            }
            self.faults.sort_by_key(|(at, _)| *at);
        }
    }

    /// Making a segment takes long in some seeds; in some an end falls while it is made.
    fn prepare(&mut self) {
        let mut rng = Rng::new(self.seed ^ 0x005e_97e7);
        let rng = &mut rng;
        self.world.slow_folders = [0.0, 0.05, 0.3, 1.0][rng.below(4) as usize];
        if self.theme == Theme::Doubt || !rng.chance(0.25) {
            return;
        }
        for _ in 0..rng.between(1, 3) {
            let (power, down) = (rng.chance(0.5), rng.between(1, 300) * MS);
            let side = if self.setup.spill_bytes > 0 && rng.chance(0.3) { Side::Source } else { Side::Target };
            let within = [0, rng.below(1000) * 1000, rng.between(1, 40) * MS][rng.below(3) as usize];
            let fault = Box::new(Fault::Fall { side, power, down });
            self.faults.push((rng.below(self.length), Fault::When { moment: Moment::Made, within, fault }));
        }
        self.faults.sort_by_key(|(at, _)| *at);
    }

    /// Policies change: while the source runs, or while it is down and the target has a promise of it.
    fn policies(&mut self) {
        let mut rng = Rng::new(self.seed ^ 0x0b01_1c7e);
        let rng = &mut rng;
        if self.theme == Theme::Doubt {
            return;
        }
        let policy = |rng: &mut Rng| Fault::Policy {
            sync_deadline: if rng.chance(0.4) { 0 } else { rng.between(200, 2500) * MS },
            cut_interval: rng.between(10, 200) * MS,
            compress: rng.chance(0.5),
        };
        if self.setup.sync_deadline > 0 && rng.chance(0.5) {
            let away = Fault::Partition(rng.between(500, 3000) * MS);
            let fall = Fault::Fall { side: Side::Source, power: rng.chance(0.3), down: rng.between(2, 200) * MS };
            let shorter = Fault::Policy {
                sync_deadline: if rng.chance(0.6) { 0 } else { 200 * MS },
                cut_interval: self.setup.cut_interval,
                compress: self.setup.compress,
            };
            let after = Fault::After(MS, Box::new(shorter));
            self.faults.push((rng.below(self.length), Fault::Many(vec![away, fall, after])));
        } else if !rng.chance(0.15) {
            return;
        }
        for _ in 0..rng.between(1, 3) {
            let change = policy(rng);
            self.faults.push((rng.below(self.length), change));
        }
        self.faults.sort_by_key(|(at, _)| *at);
    }

    /// A lease is made longer or shorter, begun or given up, while everything goes on.
    fn leases(&mut self) {
        let mut rng = Rng::new(self.seed ^ 0x01ea_5ed0);
        let rng = &mut rng;
        let often = if self.setup.lease > 0 { 0.4 } else { 0.06 };
        if self.theme == Theme::Doubt || !rng.chance(often) {
            return;
        }
        for _ in 0..rng.between(1, 3) {
            let lease = if rng.chance(0.3) { 0 } else { rng.between(3000, 6000) * MS };
            self.faults.push((rng.below(self.length), Fault::Lease(lease)));
        }
        self.faults.sort_by_key(|(at, _)| *at);
    }

    /// Hosts ask through front ends.
    fn front(&mut self) {
        let mut rng = Rng::new(self.seed ^ 0x0f20_97e2);
        let rng = &mut rng;
        self.setup.view_front = match rng.below(10) {
            0..=2 => Front::Direct,
            // Points are read in pieces of 512 bytes, too.
            3..=5 if self.world.block == 512 => Front::Ublk,
            _ => Front::Nbd,
        };
        // What a schedule meets that is about one word of a log is moved by whatever stands in between.
        self.setup.front = match rng.below(10) {
            _ if self.theme == Theme::Doubt => Front::Direct,
            0..=4 => Front::Direct,
            5..=7 => Front::Nbd,
            _ => Front::Ublk,
        };
        match self.setup.front {
            Front::Direct => {}
            Front::Nbd => self.world.net_window = self.world.net_window.max(512 * 1024),
            Front::Ublk => self.habits.unit = u64::from(self.world.block),
        }
    }

    /// Some of the mixed seeds become one schedule each in which a single word of a log is all that tells what is in
    /// doubt: extents have gone cold, one write hangs, nobody else has heard, and nothing later heals it by chance.
    fn doubt(&mut self) {
        let mut rng = Rng::new(self.seed ^ 0x00d0_0b75);
        let rng = &mut rng;
        if self.theme != Theme::Mixed || !rng.chance(0.4) {
            return;
        }
        self.theme = Theme::Doubt;
        self.setup.hot_extents = 0;
        (self.setup.lease, self.setup.sync_deadline) = (0, 0);
        self.setup.retention = 3600 * 1000 * MS;
        self.setup.budget_bytes = 1 << 30;
        self.habits.favours = false;
        self.habits.depth = self.habits.depth.max(3);
        self.world.land_after_crash = if rng.chance(0.5) { 0.0 } else { 0.5 };
        self.habits.work = rng.between(100, 400) * MS;
        self.habits.idle = rng.between(5500, 6500) * MS;
        let (work, idle) = (self.habits.work, self.habits.idle);
        let (disk, down) = (rng.below(3) as usize, rng.between(1, 300) * MS);
        let resting = work + rng.between(300, 1000) * MS;
        let fall = |power| Fault::Fall { side: Side::Source, power, down };
        let hang = |log, time| Fault::Hang { disk, log, time, falls: true };
        let before = |wakes, lead, fault| Fault::Before { wakes, lead, fault: Box::new(fault) };
        let then = 2 * (work + idle);
        self.faults = match rng.below(6) {
            0 => {
                // The first write into a cold extent ends before its bit is there, and nobody hears of it.
                let fault = Fault::Many(vec![Fault::Partition(4000 * MS), hang(true, rng.between(500, 1500) * MS)]);
                vec![(resting, before(true, rng.between(1, 20) * MS, fault))]
            }
            1 => {
                // A write is under way until its extent has been cold for long.
                self.world.land_after_crash = if rng.chance(0.5) { 1.0 } else { 0.5 };
                vec![(
                    work / 4,
                    before(false, rng.between(20, 60) * MS, hang(false, idle - rng.between(100, 500) * MS)),
                )]
            }
            2 => {
                // A stop cannot send the rest, and has no other place for it.
                self.setup.spill_bytes = if rng.chance(0.8) { 0 } else { self.setup.spill_bytes };
                let stop = Fault::After(rng.between(1, 60) * MS, Box::new(Fault::Stop { down }));
                let fault = Fault::Many(vec![Fault::Partition(rng.between(2500, 5000) * MS), stop]);
                vec![(rng.between(work / 4, work), fault)]
            }
            3 => {
                // Somebody else has written to a disk, and the log that says so is half written: its header first, and
                // again, then its bits. The target knows of nothing.
                self.setup.trust_reboot = false;
                let (shortest, longest) = self.world.disk_latency;
                let half = hang(true, rng.between(200, 900) * MS);
                let half = Fault::After(down + rng.between(shortest, 2 * longest), Box::new(half));
                let foreign = Fault::Foreign { clean: false, down };
                vec![(work + rng.between(4300, 4800) * MS, Fault::Many(vec![foreign, half]))]
            }
            4 => {
                // A synchronisation's end is all that is not acknowledged, until the bits of what it read are cleared.
                let time = rng.between(4000, 5000) * MS;
                let cut = Fault::Many(vec![
                    Fault::Partition(time),
                    Fault::After(time - 200 * MS, Box::new(fall(rng.chance(0.3)))),
                ]);
                let armed = Fault::When { moment: Moment::SyncDrawn, within: 0, fault: Box::new(cut) };
                vec![(resting, armed), (resting + MS, fall(false))]
            }
            _ if rng.chance(0.5) => {
                // A writer that the logs do not name yet is heard.
                let time = rng.between(400, 1200) * MS;
                let log =
                    Fault::After(time - rng.between(1, 40) * MS, Box::new(hang(true, rng.between(100, 700) * MS)));
                vec![(resting, Fault::Many(vec![Fault::Sever(time), fall(rng.chance(0.3)), log]))]
            }
            _ => {
                // The target's disk is that of a while ago, and the source is another process since.
                let back = Fault::Rollback { down: rng.between(200, 900) * MS, both: true };
                vec![(rng.between(work / 4, work / 2), Fault::Copy), (resting, before(true, 300 * MS, back))]
            }
        };
        self.length = then + rng.between(500, 1500) * MS;
        self.ending = Ending::Heal;
    }

    /// Only the faults of these places in the list, and this length: what a failure needs.
    pub fn keep(&mut self, faults: &[usize], length: Nanos) {
        let mut at = 0;
        self.faults.retain(|_| {
            at += 1;
            faults.contains(&(at - 1))
        });
        self.length = length;
        for (at, _) in &mut self.faults {
            *at = (*at).min(length);
        }
    }
}

fn disk_size(rng: &mut Rng, large: bool) -> u64 {
    match rng.below(if large { 8 } else { 16 }) {
        // Several extents of the write-intent log, with a part of one at the end.
        0 | 1 => 9 * MIB + rng.below(64) * 4096,
        2 | 3 => 4 * MIB + rng.below(512) * 4096,
        _ => rng.between(16, 384) * 4096,
    }
}

fn fault(rng: &mut Rng, theme: Theme) -> Fault {
    let down = rng.between(1, 600) * MS;
    let side = if rng.chance(0.5) { Side::Source } else { Side::Target };
    if rng.chance(0.7) {
        match theme {
            Theme::Mixed | Theme::Doubt => {}
            Theme::Cycles => {
                return match rng.below(12) {
                    0 | 1 => Fault::Fall { side: Side::Source, power: rng.chance(0.7), down },
                    2..=4 => Fault::FallWhen { wakes: true, power: rng.chance(0.5), down },
                    5..=7 => Fault::FallWhen { wakes: false, power: rng.chance(0.9), down },
                    8 => Fault::Stop { down },
                    9 => Fault::Foreign { clean: rng.chance(0.4), down },
                    10 => {
                        let (disk, time) = (rng.below(3) as usize, rng.between(500, 6000) * MS);
                        Fault::Hang { disk, log: rng.chance(0.2), time, falls: rng.chance(0.8) }
                    }
                    _ => Fault::Stall(Side::Source, rng.between(500, 4500) * MS),
                };
            }
            Theme::Outage => {
                let time = rng.between(200, 4000) * MS;
                return match rng.below(8) {
                    5 => Fault::Stop { down },
                    6 => Fault::Many(vec![Fault::Sever(time), Fault::After(time / 4, Box::new(Fault::Stop { down }))]),
                    7 => {
                        // The link is back, and a synchronisation begins to catch up: it goes again.
                        let again =
                            [Fault::Partition(time), Fault::Stall(Side::Target, time)][rng.below(2) as usize].clone();
                        let within = rng.between(1, 40) * MS;
                        let again = Fault::When { moment: Moment::Linked, within, fault: Box::new(again) };
                        Fault::Many(vec![Fault::Sever(time), again])
                    }
                    0 | 1 => Fault::Sever(time),
                    2 => Fault::Partition(time),
                    3 => Fault::OneWay(side, time),
                    _ => Fault::Fall { side: Side::Target, power: rng.chance(0.5), down: time },
                };
            }
            Theme::BadTarget => {
                return match rng.below(12) {
                    0..=2 => Fault::Errors(Side::Target, errors(rng), rng.between(20, 800) * MS),
                    3 => Fault::Full(rng.between(50, 1500) * MS),
                    4 | 5 => Fault::Copy,
                    6 | 7 => Fault::Rollback { down, both: rng.chance(0.5) },
                    _ => Fault::Fall { side: Side::Target, power: rng.chance(0.7), down },
                };
            }
            Theme::BadSource => {
                return match rng.below(4) {
                    0 | 1 => Fault::Errors(Side::Source, errors(rng), rng.between(20, 800) * MS),
                    _ => Fault::Fall { side: Side::Source, power: rng.chance(0.7), down },
                };
            }
            Theme::Moments => return when(rng, side),
            Theme::Folding => {
                let power = rng.chance(0.7);
                let fall = Fault::Fall { side: Side::Target, power, down: rng.between(1, 300) * MS };
                let (moment, within) = match rng.below(8) {
                    0..=2 => (Moment::Folding, rng.between(1, 60) * MS),
                    3 | 4 => (Moment::Folded, rng.between(1, 30) * MS),
                    5 => return Fault::Look,
                    _ => return Fault::Hold(rng.between(500, 5000) * MS),
                };
                return Fault::When { moment, within, fault: Box::new(fall) };
            }
            Theme::Clocks => {
                let hours = rng.between(1, 100) as i64 * 3_600_000_000_000;
                let by = if rng.chance(0.5) { hours } else { rng.between(1, 60_000) as i64 * MS as i64 };
                return match rng.below(4) {
                    0 => Fault::Jump(side, if rng.chance(0.5) { by } else { -by }),
                    1 => Fault::Jump(Side::Source, if rng.chance(0.5) { by } else { -by }),
                    2 => Fault::Stall(side, rng.between(10, 3000) * MS),
                    _ => Fault::Suspend { side, time: rng.between(10, 6000) * MS, sleeps: rng.chance(0.5) },
                };
            }
        }
    }
    match rng.below(14) {
        0 | 1 => Fault::Fall { side: Side::Source, power: rng.chance(0.4), down },
        2 | 3 => Fault::Fall { side: Side::Target, power: rng.chance(0.5), down },
        4 => Fault::Cut,
        5 => Fault::Sever(down),
        6 => Fault::Partition(down),
        7 => Fault::OneWay(side, down),
        8 => Fault::Stop { down },
        9 | 10 => Fault::Hold(rng.between(50, 3000) * MS),
        _ => Fault::Look,
    }
}

fn when(rng: &mut Rng, side: Side) -> Fault {
    let (power, time, down) = (rng.chance(0.5), rng.between(500, 4000) * MS, rng.between(1, 300) * MS);
    let moment = match rng.below(8) {
        0 | 1 => Moment::Linked,
        2 | 3 => Moment::SyncBegun,
        4 | 5 => Moment::SyncDrawn,
        6 => Moment::Folding,
        _ => Moment::Folded,
    };
    let side = match moment {
        Moment::Folding | Moment::Folded => Side::Target,
        _ if rng.chance(0.6) => Side::Source,
        _ => side,
    };
    let later = |rng: &mut Rng, fault| Fault::After(rng.between(1, 200) * MS, Box::new(fault));
    let fault = match rng.below(14) {
        10 | 11 => {
            // Answers still come, and the source falls over what it makes of them.
            let fall = Fault::Fall { side: Side::Source, power, down };
            Fault::Many(vec![Fault::OneWay(Side::Source, rng.between(50, 400) * MS), later(rng, fall)])
        }
        12 => Fault::OneWay(Side::Source, time),
        13 => Fault::Hang { disk: rng.below(3) as usize, log: true, time: time / 4, falls: true },
        0 => Fault::Sever(time),
        1 => Fault::Partition(time),
        2 => Fault::Stall(Side::Target, time),
        3 => Fault::Cut,
        4 if side == Side::Source => Fault::Stop { down },
        _ => Fault::Fall { side, power, down },
    };
    let within = [rng.below(1000) * 1000, rng.between(1, 5) * MS, rng.between(5, 60) * MS][rng.below(3) as usize];
    Fault::When { moment, within, fault: Box::new(fault) }
}

fn errors(rng: &mut Rng) -> Errors {
    let one = |rng: &mut Rng, p: f64| if rng.chance(p) { [0.02, 0.1, 0.5, 1.0][rng.below(4) as usize] } else { 0.0 };
    Errors { read: one(rng, 0.3), write: one(rng, 0.5), sync: one(rng, 0.5) }
}
