//! The durable tables of a stream at its target: the timeline table, whose generations only ever rise, and the state at
//! the fold floor.
//!
//! Both are replaced as a whole. Order matters where they meet: the state is written before the table, so a branch that
//! the table names always has its view, and the floor of the state is never below the table's.

use afterimage_wire::MAX_NUMBER;
use afterimage_wire::ids::{DiskId, IncarnationId, StreamId, TimelineId};
use afterimage_wire::record::DiskInfo;
use afterimage_wire::stream_state::{DeltaView, MAX_DELTAS, MAX_INCARNATIONS, StreamStateFile};
use afterimage_wire::timeline::{
    DiskGeneration, Fence, MAX_FENCES, MAX_TIMELINES, Timeline, TimelineKind, TimelineTable,
};

use crate::index::points::Lives;
use crate::io::{Errno, Io};
use crate::journal::Place;
use crate::target::TargetError;

/// Enters a fence into the table.
fn note_fence<I: Io>(
    io: &I,
    table: &mut TimelineTable,
    (generation, disks): (u64, Vec<DiskId>),
    place: Place,
    zero_loss: bool,
    reason: &str,
) {
    let surplus = (table.fences.len() + 1).saturating_sub(MAX_FENCES);
    table.fences.drain(..surplus);
    let (seq, incarnation, wall_ns, reason) = (place.seq, place.incarnation, io.wall(), reason.to_owned());
    table.fences.push(Fence { generation, seq, incarnation, wall_ns, zero_loss, disks, reason });
}

/// The two tables, as they are on disk.
#[derive(Debug, Clone)]
pub struct History {
    dir: String,
    table: TimelineTable,
    state: StreamStateFile,
}

fn read<I: Io>(io: &mut I, path: &str) -> Result<Option<Vec<u8>>, TargetError> {
    match io.read_small(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(TargetError::Storage { what: "reading", path: path.to_owned(), errno }),
    }
}

impl History {
    /// Stands for tables that are not read yet.
    pub fn unread(stream: StreamId) -> Self {
        let table = TimelineTable { stream, ..TimelineTable::default() };
        Self { dir: String::new(), table, state: StreamStateFile { stream, ..StreamStateFile::default() } }
    }

    /// Opens the tables in `dir`, or makes them.
    ///
    /// # Errors
    /// Storage; a table that is damaged, or of another stream.
    pub fn open<I: Io>(io: &mut I, dir: &str, stream: StreamId, name: &str) -> Result<Self, TargetError> {
        let (table_path, state_path) = (format!("{dir}/timelines"), format!("{dir}/state"));
        let format = |path: &str, error| TargetError::Format { path: path.to_owned(), error };
        let foreign = |path: &str| {
            let error =
                afterimage_wire::FormatError::Malformed { what: "table", detail: "it is that of another stream" };
            TargetError::Format { path: path.to_owned(), error }
        };
        let state = match read(io, &state_path)? {
            Some(bytes) => StreamStateFile::decode(&bytes).map_err(|error| format(&state_path, error))?,
            None => StreamStateFile { stream, ..StreamStateFile::default() },
        };
        if state.stream != stream {
            return Err(foreign(&state_path));
        }
        if let Some(bytes) = read(io, &table_path)? {
            let table = TimelineTable::decode(&bytes).map_err(|error| format(&table_path, error))?;
            if table.stream != stream {
                return Err(foreign(&table_path));
            }
            if table.fold_floor > state.floor {
                let detail = "it is missing or older than the timeline table";
                let error = afterimage_wire::FormatError::Malformed { what: "stream state", detail };
                return Err(format(&state_path, error));
            }
            return Ok(Self { dir: dir.to_owned(), table, state });
        }
        let mut id = [0; 16];
        io.random(&mut id);
        let first = Timeline {
            id: TimelineId(id),
            parent: TimelineId::NONE,
            fork_seq: 0,
            kind: TimelineKind::Source,
            created_wall_ns: io.wall(),
            reason: name.to_owned(),
        };
        let table = TimelineTable {
            stream,
            current: first.id,
            fold_floor: 0,
            timelines: vec![first],
            disks: Vec::new(),
            fences: Vec::new(),
        };
        let mut history = Self { dir: dir.to_owned(), table: TimelineTable::default(), state };
        let state = history.state.clone();
        history.write_state(io, state)?;
        history.write_table(io, table)?;
        Ok(history)
    }

    /// The timeline table.
    pub fn table(&self) -> &TimelineTable {
        &self.table
    }

    /// The state at the floor, and the views with a delta.
    pub fn state(&self) -> &StreamStateFile {
        &self.state
    }

    fn write_table<I: Io>(&mut self, io: &mut I, table: TimelineTable) -> Result<(), TargetError> {
        let path = format!("{}/timelines", self.dir);
        io.replace_small(&path, &table.encode()).map_err(|errno| TargetError::Storage {
            what: "replacing",
            path,
            errno,
        })?;
        self.table = table;
        Ok(())
    }

    /// Replaces the state.
    ///
    /// # Errors
    /// Storage; the old one counts on then, and one of the two is on disk.
    pub fn write_state<I: Io>(&mut self, io: &mut I, state: StreamStateFile) -> Result<(), TargetError> {
        let path = format!("{}/state", self.dir);
        io.replace_small(&path, &state.encode()).map_err(|errno| TargetError::Storage {
            what: "replacing",
            path,
            errno,
        })?;
        self.state = state;
        Ok(())
    }

    /// Takes over disks that are new, and generations that are higher than the table's. A disk's name and serial may
    /// change; nothing else of it.
    ///
    /// # Errors
    /// [`TargetError::Config`] if a slot or an id is that of another disk; storage.
    pub fn configure<I: Io>(&mut self, io: &mut I, disks: &[(DiskInfo, u64)], place: Place) -> Result<(), TargetError> {
        let mut table = self.table.clone();
        let mut raised: Vec<(DiskId, u64)> = Vec::new();
        for (disk, generation) in disks {
            // What could be written but not be read again would lock the stream out of its own table.
            if let Err(error) = disk.check() {
                let value = format!("{} ({error})", disk.id);
                let allowed = "blocks that are powers of two from 512 to 65536, a size in whole blocks";
                return Err(TargetError::Config { field: "disks", value, allowed });
            }
            if *generation > MAX_NUMBER {
                let value = generation.to_string();
                return Err(TargetError::Config { field: "generation", value, allowed: "at most 2^63 - 1" });
            }
            let clash = table.disks.iter().any(|known| (known.disk.id == disk.id) != (known.disk.slot == disk.slot));
            if clash {
                return Err(TargetError::Config {
                    field: "disks",
                    value: format!("{} in slot {}", disk.id, disk.slot),
                    allowed: "a slot of its own for each disk, for ever",
                });
            }
            match table.disks.iter_mut().find(|known| known.disk.id == disk.id) {
                Some(known) => {
                    if *generation > known.generation {
                        raised.push((disk.id, *generation));
                    }
                    known.generation = known.generation.max(*generation);
                    (known.disk.name, known.disk.serial) = (disk.name.clone(), disk.serial.clone());
                }
                None => table.disks.push(DiskGeneration {
                    disk: disk.clone(),
                    generation: *generation,
                    timeline: table.current,
                    member: false,
                }),
            }
        }
        while let Some((_, generation)) = raised.first().copied() {
            let disks = raised.extract_if(.., |one| one.1 == generation).map(|one| one.0).collect();
            note_fence(io, &mut table, (generation, disks), place, false, "set by the coordinator");
        }
        if table == self.table { Ok(()) } else { self.write_table(io, table) }
    }

    /// Disks joined, left or changed their size.
    ///
    /// # Errors
    /// Storage.
    pub fn note_lives<I: Io>(&mut self, io: &mut I, lives: &Lives) -> Result<(), TargetError> {
        let mut table = self.table.clone();
        for life in lives.values() {
            if let Some(known) = table.disks.iter_mut().find(|known| known.disk.id == life.info.id) {
                known.member = life.member;
                // Size and block together: one without the other may not be a disk.
                let DiskInfo { size, block, physical_block, .. } = life.info;
                (known.disk.size, known.disk.block, known.disk.physical_block) = (size, block, physical_block);
            }
        }
        if table == self.table { Ok(()) } else { self.write_table(io, table) }
    }

    /// Fences: raises the generation of `disks` (all, if none is named) to one above the highest among them; returns it.
    /// `place` is the newest durable place: what its writer has on its way belongs to the losing branch. `zero_loss`:
    /// no answered write was missing there.
    ///
    /// # Errors
    /// A disk that is not in the table; storage: nothing counts as raised then, although it may be on disk.
    pub fn raise<I: Io>(
        &mut self,
        io: &mut I,
        disks: &[DiskId],
        place: Place,
        zero_loss: bool,
        reason: &str,
    ) -> Result<u64, TargetError> {
        let mut table = self.table.clone();
        let all: Vec<DiskId> = match disks {
            [] => table.disks.iter().map(|disk| disk.disk.id).collect(),
            some => some.to_vec(),
        };
        if let Some(unknown) = all.iter().find(|id| table.disk(**id).is_none()) {
            return Err(TargetError::UnknownDisk(*unknown));
        }
        let named = |disk: &&mut DiskGeneration| all.contains(&disk.disk.id);
        let generation = 1 + table.disks.iter_mut().filter(named).map(|disk| disk.generation).max().unwrap_or(0);
        if generation > MAX_NUMBER {
            let (value, allowed) = (generation.to_string(), "at most 2^63 - 1");
            return Err(TargetError::Config { field: "generation", value, allowed });
        }
        table.disks.iter_mut().filter(named).for_each(|disk| disk.generation = generation);
        note_fence(io, &mut table, (generation, all), place, zero_loss, reason);
        self.write_table(io, table)?;
        Ok(generation)
    }

    /// Raises the floor: `lives` are the disks after record `floor`. Durable before any image is overwritten with what
    /// lies below it.
    ///
    /// # Errors
    /// Storage: the floor may be raised on disk then, but nothing may be folded.
    pub fn raise_floor<I: Io>(
        &mut self,
        io: &mut I,
        floor: u64,
        lives: &Lives,
        newest_cut: u64,
        incarnation: IncarnationId,
    ) -> Result<(), TargetError> {
        if floor > self.state.floor {
            let mut state = self.state.clone();
            (state.floor, state.newest_cut) = (floor, newest_cut);
            state.disks = lives.values().cloned().collect();
            if !state.incarnations.contains(&incarnation) {
                state.incarnations.push(incarnation);
                let surplus = state.incarnations.len().saturating_sub(MAX_INCARNATIONS);
                state.incarnations.drain(..surplus);
            }
            self.write_state(io, state)?;
        }
        if floor > self.table.fold_floor {
            let mut table = self.table.clone();
            table.fold_floor = floor;
            self.write_table(io, table)?;
        }
        Ok(())
    }

    /// Adds a branch for a view's delta.
    ///
    /// # Errors
    /// Too many; storage.
    pub fn add_delta<I: Io>(&mut self, io: &mut I, view: DeltaView, reason: &str) -> Result<(), TargetError> {
        if self.state.views.len() >= MAX_DELTAS || self.table.timelines.len() >= MAX_TIMELINES {
            return Err(TargetError::TooManyViews);
        }
        let mut table = self.table.clone();
        table.timelines.push(Timeline {
            id: view.timeline,
            parent: table.current,
            fork_seq: view.seq,
            kind: view.kind,
            created_wall_ns: io.wall(),
            reason: reason.to_owned(),
        });
        if view.kind == TimelineKind::Failover {
            for disk in table.disks.iter_mut().filter(|disk| view.disks.contains(&disk.disk.id)) {
                disk.timeline = view.timeline;
            }
        }
        let mut state = self.state.clone();
        state.views.push(view);
        self.write_state(io, state)?;
        self.write_table(io, table)
    }

    /// The delta is being removed: its segments may go from now on.
    ///
    /// # Errors
    /// Storage.
    pub fn begin_removal<I: Io>(&mut self, io: &mut I, timeline: TimelineId) -> Result<(), TargetError> {
        let mut state = self.state.clone();
        state.views.iter_mut().filter(|view| view.timeline == timeline).for_each(|view| view.removing = true);
        self.write_state(io, state)
    }

    /// The delta's segments are gone: so is its branch.
    ///
    /// # Errors
    /// Storage.
    pub fn end_removal<I: Io>(&mut self, io: &mut I, timeline: TimelineId) -> Result<(), TargetError> {
        let mut table = self.table.clone();
        table.timelines.retain(|known| known.id != timeline);
        for disk in table.disks.iter_mut().filter(|disk| disk.timeline == timeline) {
            disk.timeline = table.current;
        }
        self.write_table(io, table)?;
        let mut state = self.state.clone();
        state.views.retain(|view| view.timeline != timeline);
        self.write_state(io, state)
    }

    /// Drops views whose branch never came to be (a crash between the two tables).
    ///
    /// # Errors
    /// Storage.
    pub fn drop_orphans<I: Io>(&mut self, io: &mut I) -> Result<(), TargetError> {
        let mut state = self.state.clone();
        state.views.retain(|view| view.removing || self.table.timeline(view.timeline).is_some());
        if state == self.state { Ok(()) } else { self.write_state(io, state) }
    }
}
