//! Opening the files of a group: all of them or none; and what their write-intent logs say together.

use afterimage_wire::ALIGN;
use afterimage_wire::ids::{DiskId, StreamId};
use afterimage_wire::intent::{INTENT_MAGIC, IntentHeader, PAGE_MAGIC, PAGES_AT, Witness};
use afterimage_wire::segment::Predecessor;

use super::config::{DiskConfig, ProtectError};
use crate::intent::{Loaded, Verdict, load, log_len};
use crate::io::{Errno, File, FileInfo, Io, OpenHow};

/// Largest block of a disk, bytes: blocks are completed within a page of headroom.
const MAX_BLOCK: u32 = 4096;
/// A host may be told of larger blocks than the disk has.
const MAX_GIVEN_BLOCK: u32 = 65536;

/// A disk with its log, opened.
#[derive(Debug)]
pub(super) struct Opened {
    pub file: File,
    pub info: FileInfo,
    pub log: File,
    pub loaded: Loaded,
    /// Which file the log is; 0 if the system does not tell.
    pub log_identity: u64,
    /// Witness of the log.
    pub witness: Option<File>,
    /// What an older copy of the log says, which counts for nothing else.
    pub older: Option<IntentHeader>,
    /// The log was made just now.
    made: bool,
}

fn failed(path: &str, action: &'static str, errno: Errno) -> ProtectError {
    let path = path.to_owned();
    match errno {
        Errno::AGAIN | Errno::BUSY => ProtectError::Locked { path },
        errno => ProtectError::File { path, action, errno },
    }
}

/// Opens a disk under its lock and checks that it can be served.
pub(super) fn open_disk<I: Io>(io: &mut I, config: &DiskConfig) -> Result<(File, FileInfo), ProtectError> {
    let how = OpenHow { write: !config.read_only, create_new: false, lock: !mutant!(DiskNotLocked) };
    let file = io.open(&config.path, how).map_err(|errno| failed(&config.path, "open", errno))?;
    let info = io.info(file).map_err(|errno| failed(&config.path, "inspect", errno));
    let checked = info.and_then(|info| {
        // Which of many disks it is stands beside the number.
        let refuse = |field, value: u64, allowed| {
            Err(ProtectError::Value { field, value: format!("{value} bytes (`{}`)", config.path), allowed })
        };
        if !info.block.is_power_of_two() || info.block < 512 || info.block > MAX_BLOCK {
            return refuse("block size of the disk", info.block.into(), "512, 1024, 2048 or 4096");
        }
        let given = info.block.max(config.block);
        if !given.is_power_of_two() || given > MAX_GIVEN_BLOCK {
            return refuse("block size given to the disk", given.into(), "a power of two up to 65536");
        }
        if info.size == 0 || !info.size.is_multiple_of(given.into()) {
            return refuse("size of the disk", info.size, "a multiple of its block, not 0");
        }
        let physical = info.physical_block.clamp(given, MAX_GIVEN_BLOCK);
        let physical = if physical.is_power_of_two() { physical } else { given };
        // What hosts are told may be larger than what is completed in place: see `Disk::told_block`.
        Ok(FileInfo { block: given.min(MAX_BLOCK), physical_block: physical, ..info })
    });
    match checked {
        Ok(info) => Ok((file, info)),
        Err(error) => {
            io.close(file);
            Err(error)
        }
    }
}

fn open_log<I: Io>(
    io: &mut I,
    path: &str,
    disk: DiskId,
    size: u64,
    stream: StreamId,
) -> Result<(File, Loaded, bool), ProtectError> {
    let how = OpenHow { write: true, create_new: false, lock: true };
    let (file, made) = match io.open(path, how) {
        Ok(file) => (file, false),
        Err(Errno::NOENT) => {
            let how = OpenHow { create_new: true, ..how };
            (io.open(path, how).map_err(|errno| failed(path, "make", errno))?, true)
        }
        Err(errno) => return Err(failed(path, "open", errno)),
    };
    let prepared = prepare_log(io, file, path, disk, size, stream, made);
    match prepared {
        Ok(loaded) => Ok((file, loaded, made)),
        Err(error) => {
            io.close(file);
            if made {
                let _ = io.remove(path);
            }
            Err(error)
        }
    }
}

fn prepare_log<I: Io>(
    io: &mut I,
    file: File,
    path: &str,
    disk: DiskId,
    size: u64,
    stream: StreamId,
    made: bool,
) -> Result<Loaded, ProtectError> {
    let bytes = if made { Vec::new() } else { io.read_small(path).map_err(|errno| failed(path, "read", errno))? };
    let at = |offset: u64, magic: [u8; 4]| bytes.get(offset as usize..).is_some_and(|b| b.starts_with(&magic));
    let ours = at(0, INTENT_MAGIC) || at(4096, INTENT_MAGIC) || at(PAGES_AT, PAGE_MAGIC);
    if !ours && bytes.iter().any(|b| *b != 0) {
        let allowed = "a write-intent log, or a path where nothing is";
        return Err(ProtectError::Value { field: "log_path", value: path.to_owned(), allowed });
    }
    let loaded = load(&bytes, disk, size, stream);
    if (bytes.len() as u64) < log_len(size) {
        io.set_len(file, log_len(size), true).map_err(|errno| failed(path, "allocate", errno))?;
    }
    if made {
        let parent = match path.rfind('/') {
            Some(0) => "/",
            Some(at) => &path[..at],
            None => ".",
        };
        io.sync_dir(parent).map_err(|errno| failed(parent, "sync", errno))?;
    }
    Ok(loaded)
}

/// Opens the witness of a log, made if it is missing; and what it says, if it is of this disk. Without it the disk is
/// protected all the same.
fn open_witness<I: Io>(io: &mut I, config: &DiskConfig, stream: StreamId) -> Option<(File, u64)> {
    let path = &config.witness_path;
    let how = OpenHow { write: true, create_new: false, lock: true };
    let opened = match io.open(path, how) {
        Err(Errno::NOENT) => {
            let made = io.open(path, OpenHow { create_new: true, ..how });
            made.and_then(|file| {
                io.set_len(file, ALIGN as u64, true).map(|()| (file, 0)).inspect_err(|_| io.close(file))
            })
        }
        Ok(file) => {
            let read = io.read_small(path).inspect_err(|_| io.close(file));
            // Torn by a power loss, or of another disk: it says nothing.
            let said = |bytes: Vec<u8>| Witness::decode(&bytes).ok();
            let ours = |w: &Witness| w.disk == config.id && w.stream == stream;
            read.map(|bytes| (file, said(bytes).filter(ours).map_or(0, |w| w.serial)))
        }
        Err(errno) => Err(errno),
    };
    let failed = |errno: &Errno| {
        let disk = &config.name;
        tracing::warn!(disk, path, %errno, "an older copy of the write-intent log would not be noticed: no witness");
    };
    opened.inspect_err(failed).ok()
}

/// Finds out an older copy of a log: nothing that it says of the disk counts.
fn judge_age(one: &mut Opened, seen: u64) {
    let Verdict::Good(header) = &one.loaded.verdict else {
        one.loaded.serial = one.loaded.serial.max(seen);
        return;
    };
    // A copy by way of another file is told by that alone.
    let other = header.log_identity != 0 && one.log_identity != 0 && header.log_identity != one.log_identity;
    if one.loaded.serial >= seen && !other {
        return;
    }
    let why = if other { "a copy in another file" } else { "an older copy" };
    let serial = one.loaded.serial.max(seen);
    one.older = Some(**header);
    let verdict = Verdict::Foreign(why);
    one.loaded = Loaded { verdict, serial, extents: Vec::new(), torn: Vec::new(), rewrite: true, ..one.loaded };
}

/// Opens every disk of a group with its log. On an error nothing stays open, and no log stays that was made.
pub(super) fn open_all<I: Io>(io: &mut I, stream: StreamId, disks: &[DiskConfig]) -> Result<Vec<Opened>, ProtectError> {
    let mut opened = Vec::with_capacity(disks.len());
    for config in disks {
        let one = open_disk(io, config).and_then(|(file, info)| {
            open_log(io, &config.log_path, config.id, info.size, stream)
                .map(|(log, loaded, made)| {
                    let log_identity = io.info(log).map_or(0, |info| info.identity);
                    Opened { file, info, log, loaded, log_identity, witness: None, older: None, made }
                })
                .inspect_err(|_| io.close(file))
        });
        match one {
            Ok(mut one) => {
                let found = Some(config).filter(|c| !c.witness_path.is_empty());
                let found = found.and_then(|config| open_witness(io, config, stream));
                one.witness = found.map(|(file, _)| file);
                judge_age(&mut one, found.map_or(0, |(_, seen)| seen));
                opened.push(one);
            }
            Err(error) => {
                close_all(io, disks, opened);
                return Err(error);
            }
        }
    }
    Ok(opened)
}

/// Closes what [`open_all`] opened, and removes what it made.
pub(super) fn close_all<I: Io>(io: &mut I, disks: &[DiskConfig], opened: Vec<Opened>) {
    for (one, config) in opened.into_iter().zip(disks) {
        io.close(one.file);
        io.close(one.log);
        one.witness.into_iter().for_each(|file| io.close(file));
        if one.made {
            let _ = io.remove(&config.log_path);
        }
    }
}

/// What the logs of a group say of the life before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Lineage {
    /// The newest writer that may have sent anything, and its acknowledged place.
    pub predecessor: Predecessor,
    /// The one before it, if nothing of the newest is known to have arrived.
    pub alternative: Option<Predecessor>,
    /// Per disk: its log does not belong with the others; the disk is compared in full.
    pub odd: Vec<bool>,
}

/// Judges the headers of a group's logs; none where a log does not count.
///
/// All logs name a writer before its first frame leaves. So if some name a new writer and the others the one before
/// it, nothing of the new one was ever sent.
pub(super) fn lineage(headers: &[Option<IntentHeader>]) -> Lineage {
    let own = |h: &IntentHeader| Predecessor { incarnation: h.incarnation, frame: h.acked_frame, seq: h.acked_seq };
    let Some(newest) = headers.iter().flatten().max_by_key(|h| (h.reserved_seq, h.acked_frame)) else {
        return Lineage { odd: vec![true; headers.len()], ..Lineage::default() };
    };
    let unsent = |writer: &IntentHeader| {
        writer.acked_frame == 0
            && !writer.prior.incarnation.is_none()
            && headers.iter().flatten().any(|h| h.incarnation == writer.prior.incarnation)
    };
    let chosen = match headers.iter().flatten().find(|h| unsent(h)) {
        Some(writer) => writer.prior.incarnation,
        None => newest.incarnation,
    };
    let mut lineage = Lineage::default();
    lineage.predecessor.incarnation = chosen;
    for header in headers {
        let place = match header {
            Some(h) if h.incarnation == chosen => Some(own(h)),
            Some(h) if h.acked_frame == 0 && h.prior.incarnation == chosen && !chosen.is_none() => Some(h.prior),
            _ => None,
        };
        lineage.odd.push(place.is_none());
        let Some(place) = place else { continue };
        if (place.frame, place.seq) > (lineage.predecessor.frame, lineage.predecessor.seq) {
            lineage.predecessor = place;
        }
    }
    if lineage.predecessor.frame == 0 {
        let prior = headers.iter().flatten().find(|h| h.incarnation == chosen && !h.prior.incarnation.is_none());
        lineage.alternative = prior.map(|h| h.prior);
    }
    lineage
}

/// The place up to which the spill must hold everything, as all logs that count say, for their bits not to be in doubt;
/// none if one of them does not say so.
pub(super) fn spilled(headers: &[Option<IntentHeader>]) -> Option<Predecessor> {
    let mut all = headers.iter().flatten();
    let place = all.next().filter(|h| h.clean && !h.spilled.incarnation.is_none())?.spilled;
    all.all(|h| h.clean && h.spilled == place).then_some(place)
}

/// What a disk owes, by its own log.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) struct Owed {
    /// A whole synchronisation must reach its end …
    pub whole: bool,
    /// … and begins at zero: the log does not say what of it was done.
    pub all: bool,
    /// A synchronisation had begun and its end is not known to have arrived.
    pub end: bool,
}

/// Judges the log of a disk.
pub(super) fn owed(loaded: &Loaded, config: &DiskConfig, info: &FileInfo, boot: [u8; 16]) -> Owed {
    let Verdict::Good(header) = &loaded.verdict else { return Owed { whole: true, all: true, end: false } };
    let rebooted = header.boot != boot;
    // Another file or device than the one that the log is of: a copy, a disk brought back from elsewhere, two swapped.
    let other = header.identity != 0 && info.identity != 0 && header.identity != info.identity;
    // Stopped cleanly, and the file has changed since: someone else wrote to it.
    let told = !(info.device && rebooted);
    let touched = header.clean && told && header.mtime_ns != info.mtime_ns;
    // A device tells only of this boot; after another one only a clean stop and an unchanged file do.
    let unchanged = header.clean && info.mtime_ns != 0 && !info.device;
    let unknown = rebooted && !(config.trust_reboot || mutant!(RebootTrusted) || unchanged);
    let all = other || touched || unknown || (header.whole_owed && !header.mapped);
    Owed { whole: all || header.whole_owed, all, end: header.sync_owed }
}

#[cfg(test)]
mod tests {
    use afterimage_wire::ids::IncarnationId;

    use super::*;

    fn header(incarnation: u8, acked: u64, prior: (u8, u64)) -> Option<IntentHeader> {
        Some(IntentHeader {
            incarnation: IncarnationId([incarnation; 16]),
            acked_frame: acked,
            acked_seq: acked * 10,
            reserved_seq: u64::from(incarnation) * 1000,
            prior: place(prior.0, prior.1),
            ..IntentHeader::default()
        })
    }

    fn place(incarnation: u8, frame: u64) -> Predecessor {
        Predecessor { incarnation: IncarnationId([incarnation; 16]), frame, seq: frame * 10 }
    }

    #[test]
    fn no_log_is_the_first_life() {
        let found = lineage(&[None, None]);
        assert_eq!(found.predecessor, Predecessor::default());
        assert_eq!(found.odd, [true, true]);
    }

    #[test]
    fn the_furthest_place_of_all_logs_counts() {
        let found = lineage(&[header(1, 5, (0, 0)), header(1, 9, (0, 0))]);
        assert_eq!(found.predecessor, place(1, 9));
        assert_eq!((found.alternative, found.odd), (None, vec![false, false]));
    }

    #[test]
    fn a_writer_that_not_all_logs_name_has_sent_nothing() {
        let found = lineage(&[header(2, 0, (1, 7)), header(1, 4, (0, 0))]);
        assert_eq!(found.predecessor, place(1, 7));
        assert_eq!((found.alternative, found.odd), (None, vec![false, false]));
    }

    #[test]
    fn a_writer_that_all_logs_name_may_have_sent() {
        let found = lineage(&[header(2, 0, (1, 7)), header(2, 0, (1, 7))]);
        assert_eq!(found.predecessor, place(2, 0));
        assert_eq!(found.alternative, Some(place(1, 7)));
    }

    #[test]
    fn a_log_of_another_life_is_odd() {
        let found = lineage(&[header(3, 8, (2, 1)), header(1, 4, (0, 0)), None]);
        assert_eq!(found.predecessor, place(3, 8));
        assert_eq!(found.odd, [false, true, true]);
    }

    #[test]
    fn a_stop_rests_on_the_spill_only_if_all_logs_say_so() {
        let of = |clean, frame| Some(IntentHeader { clean, spilled: place(4, frame), ..IntentHeader::default() });
        assert_eq!(spilled(&[of(true, 9), None, of(true, 9)]), Some(place(4, 9)));
        assert_eq!(spilled(&[of(true, 9), of(true, 8)]), None);
        assert_eq!(spilled(&[of(true, 9), of(false, 9)]), None);
        assert_eq!(spilled(&[Some(IntentHeader { clean: true, ..IntentHeader::default() })]), None);
        assert_eq!(spilled(&[None]), None);
    }

    #[test]
    fn trust_in_a_disk_ends_with_a_reboot_or_another_writer() {
        let (config, boot) = (DiskConfig::default(), [7; 16]);
        let info = FileInfo {
            size: 8192,
            block: 512,
            physical_block: 4096,
            discard: true,
            device: false,
            mtime_ns: 50,
            identity: 3,
        };
        let judge = |header: IntentHeader, config: &DiskConfig, info: &FileInfo| {
            let loaded = Loaded {
                verdict: Verdict::Good(Box::new(header)),
                serial: 1,
                slot: 0,
                extents: Vec::new(),
                torn: Vec::new(),
                rewrite: false,
            };
            owed(&loaded, config, info, boot).all
        };
        let crashed = IntentHeader { boot, ..IntentHeader::default() };
        let clean = IntentHeader { boot, clean: true, mtime_ns: 50, ..IntentHeader::default() };
        assert!(!judge(crashed, &config, &info));
        assert!(!judge(clean, &config, &info));
        assert!(judge(IntentHeader { mtime_ns: 49, ..clean }, &config, &info));
        assert!(judge(IntentHeader { whole_owed: true, ..crashed }, &config, &info));
        assert!(!judge(IntentHeader { whole_owed: true, mapped: true, ..crashed }, &config, &info));
        assert!(judge(IntentHeader { boot: [8; 16], ..crashed }, &config, &info));
        assert!(!judge(IntentHeader { boot: [8; 16], ..clean }, &config, &info));
        let trusting = DiskConfig { trust_reboot: true, ..DiskConfig::default() };
        assert!(!judge(IntentHeader { boot: [8; 16], ..crashed }, &trusting, &info));
        assert!(!judge(IntentHeader { identity: 3, ..crashed }, &config, &info));
        assert!(judge(IntentHeader { identity: 4, ..crashed }, &config, &info), "another file is there");
        assert!(judge(IntentHeader { identity: 4, ..clean }, &trusting, &info));
        let device = FileInfo { device: true, ..info };
        assert!(!judge(clean, &config, &device));
        assert!(judge(IntentHeader { mtime_ns: 49, ..clean }, &config, &device), "written to by someone else");
        assert!(judge(IntentHeader { boot: [8; 16], ..clean }, &config, &device), "its count began anew");
        assert!(!judge(IntentHeader { boot: [8; 16], mtime_ns: 7, ..clean }, &trusting, &device));
        let device = FileInfo { mtime_ns: 0, device: true, ..info };
        assert!(judge(IntentHeader { boot: [8; 16], mtime_ns: 0, ..clean }, &config, &device));
    }
}
