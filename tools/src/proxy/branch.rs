//! What a source's disks hold that the target may not: read from the write-intent logs as they are on disk, so also of a
//! group that is not started any more because a failover has taken it from here.
//!
//! The extents whose bit is set are the map. While the group's I/O is held it does not change, and the disks' content
//! there is the losing branch; an export writes just that, as sparse images beside a table.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use afterimage_dataplane::intent::{Verdict, load};
use afterimage_dataplane::source::DiskConfig;
use afterimage_wire::ids::StreamId;
use afterimage_wire::intent::EXTENT;
use afterimage_wire::v1::{Branch, BranchDisk, ByteRange, CommandErrorKind as Kind, InspectBranch, SourceGroup};

use super::commands::{Refused, refused};
use super::convert;
use super::keep;
use super::state::Proxy;

/// Bytes copied at a time.
const PIECE: usize = 1 << 20;
/// Most ranges of a disk in an answer; beyond it those nearest to each other are joined.
const MAX_RANGES: usize = 65_536;
/// Name of the table beside the images.
const TABLE: &str = "branch.json";

/// Lists what a group's disks hold that the target may not; writes it, too, if that is asked.
pub async fn inspect(proxy: &Proxy, said: &InspectBranch) -> Result<Branch, Refused> {
    let stream: StreamId = convert::id("stream_uid", &said.stream_uid)?;
    let of = |group: &&SourceGroup| group.stream_uid == said.stream_uid;
    let running = proxy.applied.borrow().groups.get(&stream).cloned();
    let wanted = proxy.desired.borrow().sources.iter().find(of).cloned();
    let Some(group) = running.or(wanted) else {
        return refused(Kind::NotFound, format!("stream {stream} is not protected from here"));
    };
    let disks = convert::group(&group, &proxy.places_of(&group), false)?.disks;
    let folder = said.export_to.clone();
    if !folder.is_empty() && !folder.starts_with('/') {
        return refused(Kind::Invalid, format!("export_to `{folder}`: allowed is an absolute path"));
    }
    // Bulk files: away from the thread that answers the coordinator and makes the links.
    let done = tokio::task::spawn_blocking(move || branch_of(stream, &disks, &folder)).await;
    match done {
        Ok(Ok(branch)) => Ok(branch),
        Ok(Err(why)) => refused(Kind::Io, why),
        Err(_) => refused(Kind::Io, "the copy has ended early: see the log"),
    }
}

/// As [`inspect`], of disks that nobody writes to; into `folder` unless that is empty.
pub(super) fn branch_of(stream: StreamId, disks: &[DiskConfig], folder: &str) -> Result<Branch, String> {
    let mut branch = Branch { disks: Vec::with_capacity(disks.len()) };
    for disk in disks {
        branch.disks.push(disk_of(stream, disk).map_err(|error| format!("`{}`: {error}", disk.log_path))?);
    }
    if folder.is_empty() {
        return Ok(branch);
    }
    let folder = Path::new(folder);
    keep::folder(folder).map_err(|error| format!("`{}`: {error}", folder.display()))?;
    for (one, disk) in branch.disks.iter_mut().zip(disks) {
        let path = folder.join(format!("{}.img", one.disk_uid));
        copy(Path::new(&disk.path), &path, one).map_err(|error| format!("`{}`: {error}", path.display()))?;
        one.file = path.to_string_lossy().into_owned();
    }
    // The table goes last: where it is, everything is.
    let table = folder.join(TABLE);
    keep::replace(&table, table_of(stream, &branch).to_string().as_bytes())
        .map_err(|error| format!("`{}`: {error}", table.display()))?;
    Ok(branch)
}

/// The map of one disk.
fn disk_of(stream: StreamId, disk: &DiskConfig) -> io::Result<BranchDisk> {
    let size = length(&File::open(&disk.path)?)?;
    let bytes = match std::fs::read(&disk.log_path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        read => read?,
    };
    let loaded = load(&bytes, disk.id, size, stream);
    let header = match &loaded.verdict {
        Verdict::Good(header) => Some(**header),
        Verdict::Missing | Verdict::Foreign(_) => None,
    };
    let whole = header.is_none_or(|header| header.whole_owed);
    let mut ranges = Vec::new();
    if whole {
        ranges.push(ByteRange { offset: 0, length: size });
    } else {
        let mut extents = loaded.extents;
        extents.sort_unstable();
        extents.iter().for_each(|extent| add(&mut ranges, u64::from(*extent) * EXTENT, size));
    }
    shorten(&mut ranges);
    Ok(BranchDisk {
        disk_uid: disk.id.to_string(),
        name: disk.label.clone(),
        generation: header.map_or(disk.generation, |header| header.generation),
        fenced: header.is_some_and(|header| header.fenced),
        whole,
        size_bytes: size,
        ranges,
        file: String::new(),
    })
}

/// A device has no length of its own; its end is where one can seek to.
fn length(file: &File) -> io::Result<u64> {
    io::Seek::seek(&mut &*file, io::SeekFrom::End(0))
}

fn add(ranges: &mut Vec<ByteRange>, offset: u64, size: u64) {
    let length = EXTENT.min(size.saturating_sub(offset));
    match ranges.last_mut() {
        Some(last) if last.offset + last.length == offset => last.length += length,
        _ => ranges.push(ByteRange { offset, length }),
    }
}

/// Joins neighbours until there are few enough: more is named than differs, never less.
fn shorten(ranges: &mut Vec<ByteRange>) {
    while ranges.len() > MAX_RANGES {
        let mut joined: Vec<ByteRange> = Vec::with_capacity(ranges.len() / 2 + 1);
        for pair in ranges.chunks(2) {
            let (first, last) = (pair[0], pair[pair.len() - 1]);
            joined.push(ByteRange { offset: first.offset, length: last.offset + last.length - first.offset });
        }
        *ranges = joined;
    }
}

/// Copies the ranges into a sparse image as long as the disk.
fn copy(from: &Path, to: &Path, disk: &BranchDisk) -> io::Result<()> {
    let source = File::open(from)?;
    // A new file for its owner only, and none that somebody has put there.
    let image = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    image.set_len(disk.size_bytes)?;
    let mut buf = vec![0; PIECE];
    for range in &disk.ranges {
        let mut at = range.offset;
        let end = range.offset + range.length;
        while at < end {
            let piece = &mut buf[..PIECE.min((end - at) as usize)];
            source.read_exact_at(piece, at)?;
            if piece.iter().any(|byte| *byte != 0) {
                image.write_all_at(piece, at)?;
            }
            at += piece.len() as u64;
        }
    }
    image.sync_all()
}

fn table_of(stream: StreamId, branch: &Branch) -> serde_json::Value {
    let disk = |disk: &BranchDisk| {
        serde_json::json!({
            "disk": disk.name,
            "uid": disk.disk_uid,
            "generation": disk.generation,
            "fenced": disk.fenced,
            "whole": disk.whole,
            "size_bytes": disk.size_bytes,
            "ranges": disk.ranges.iter().map(|r| [r.offset, r.length]).collect::<Vec<_>>(),
            "file": disk.file,
        })
    };
    serde_json::json!({"stream": stream.to_string(), "disks": branch.disks.iter().map(disk).collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use afterimage_dataplane::intent::log_len;
    use afterimage_wire::ALIGN;
    use afterimage_wire::ids::DiskId;
    use afterimage_wire::intent::{IntentHeader, PAGE_BITS, PAGES_AT, encode_page};

    use super::*;

    const SIZE: u64 = 10 * EXTENT + 4096;

    fn log(header: IntentHeader, set: &[usize]) -> Vec<u8> {
        let mut bytes = vec![0; log_len(SIZE) as usize];
        bytes[..ALIGN].copy_from_slice(&header.encode());
        let mut bits = vec![0; (PAGE_BITS / 8) as usize];
        set.iter().for_each(|bit| bits[bit / 8] |= 1 << (bit % 8));
        encode_page(0, 1, &bits, &mut bytes[PAGES_AT as usize..][..ALIGN]);
        bytes
    }

    #[test]
    fn the_map_is_what_the_log_says_and_the_export_holds_just_that() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
        let (stream, id) = (StreamId::random(), DiskId::random());
        let mut content = vec![7; SIZE as usize];
        content[3 * EXTENT as usize..4 * EXTENT as usize].fill(9);
        std::fs::write(at("d.raw"), &content).unwrap();
        let header =
            IntentHeader { serial: 1, disk: id, size: SIZE, stream, generation: 4, fenced: true, ..Default::default() };
        std::fs::write(at("d.log"), log(header, &[2, 3, 10])).unwrap();
        let disk =
            DiskConfig { id, label: "data".into(), path: at("d.raw"), log_path: at("d.log"), ..DiskConfig::default() };
        let branch = branch_of(stream, std::slice::from_ref(&disk), &at("out")).unwrap();
        let one = &branch.disks[0];
        assert_eq!((one.generation, one.fenced, one.whole), (4, true, false));
        let ranges: Vec<_> = one.ranges.iter().map(|r| (r.offset, r.length)).collect();
        assert_eq!(ranges, [(2 * EXTENT, 2 * EXTENT), (10 * EXTENT, 4096)]);
        let image = std::fs::read(&one.file).unwrap();
        assert_eq!(image.len() as u64, SIZE);
        assert_eq!((image[0], image[3 * EXTENT as usize], image[10 * EXTENT as usize]), (0, 9, 7));
        assert!(std::fs::read_to_string(at("out/branch.json")).unwrap().contains("\"data\""));
        // What is there is not written over.
        assert!(branch_of(stream, std::slice::from_ref(&disk), &at("out")).is_err());
        // Without a log nobody knows: everything is in doubt.
        std::fs::remove_file(at("d.log")).unwrap();
        let whole = branch_of(stream, &[disk], "").unwrap();
        assert!(whole.disks[0].whole && whole.disks[0].ranges[0].length == SIZE);
    }

    #[test]
    fn too_many_ranges_are_joined_and_none_is_lost() {
        let mut ranges: Vec<ByteRange> =
            (0..MAX_RANGES as u64 + 3).map(|n| ByteRange { offset: 2 * n * EXTENT, length: EXTENT }).collect();
        let end = ranges.last().map(|r| r.offset + r.length).unwrap();
        shorten(&mut ranges);
        assert!(ranges.len() <= MAX_RANGES);
        assert_eq!((ranges[0].offset, ranges.last().map(|r| r.offset + r.length)), (0, Some(end)));
    }
}
