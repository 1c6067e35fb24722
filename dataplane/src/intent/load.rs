//! Reading a write-intent log: what it is worth, and what it says.

use afterimage_wire::ALIGN;
use afterimage_wire::ids::{DiskId, StreamId};
use afterimage_wire::intent::{EXTENT, IntentHeader, PAGE_BITS, PAGES_AT, decode_page, page_serial};

use super::log_len;

/// What a log is worth.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Of this disk and this stream.
    Good(Box<IntentHeader>),
    /// There is none, or an empty file.
    Missing,
    /// Of another disk, size or stream, no valid header, or an older copy: nothing in it counts.
    Foreign(&'static str),
}

/// What a log says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Loaded {
    /// What it is worth.
    pub verdict: Verdict,
    /// Highest serial of any write: of a valid header, or of a page behind it. A new one must be above it.
    pub serial: u64,
    /// The header slot that counts; a new header goes to the other one.
    pub slot: u8,
    /// Extents that are set.
    pub extents: Vec<u32>,
    /// Pages that do not read: all their extents are among `extents`.
    pub torn: Vec<u32>,
    /// Every page must be written anew.
    pub rewrite: bool,
}

/// Reads the bytes of a log file, for the disk that is expected.
pub fn load(bytes: &[u8], disk: DiskId, size: u64, stream: StreamId) -> Loaded {
    let slots = bytes.chunks_exact(ALIGN).take(2).enumerate();
    let slots = slots.filter_map(|(at, slot)| Some((at as u8, IntentHeader::decode(slot).ok()?)));
    let newest = slots.max_by_key(|(_, header)| header.serial);
    let (slot, mut serial) = newest.map_or((0, 0), |(slot, header)| (slot, header.serial));
    let useless = |verdict| Loaded { verdict, serial, slot, extents: Vec::new(), torn: Vec::new(), rewrite: true };
    let Some((_, header)) = newest else {
        let blank = bytes.iter().all(|b| *b == 0);
        return useless(if blank { Verdict::Missing } else { Verdict::Foreign("no valid header") });
    };
    if header.disk != disk {
        return useless(Verdict::Foreign("of another disk"));
    }
    if header.size > size {
        return useless(Verdict::Foreign("of a larger disk"));
    }
    if header.stream != stream {
        return useless(Verdict::Foreign("of another stream"));
    }
    if (bytes.len() as u64) < log_len(header.size) {
        return useless(Verdict::Foreign("cut short"));
    }
    // What the disk has grown by since is not in its bits.
    let total = header.size.div_ceil(EXTENT);
    let (mut extents, mut torn) = (Vec::new(), Vec::new());
    for (page, content) in bytes[PAGES_AT as usize..].chunks_exact(ALIGN).enumerate() {
        let first = page as u64 * PAGE_BITS;
        let last = (first + PAGE_BITS).min(total);
        match decode_page(page as u32, content) {
            Ok(bits) => {
                serial = serial.max(page_serial(content, header.serial).unwrap_or(0));
                extents.extend((first..last).map(|e| e as u32).filter(|e| {
                    let bit = (u64::from(*e) - first) as usize;
                    bits[bit / 8] >> (bit % 8) & 1 == 1
                }));
            }
            Err(_) if first < last => {
                torn.push(page as u32);
                extents.extend((first..last).map(|e| e as u32));
            }
            Err(_) => {}
        }
    }
    if header.size < size {
        let first = (header.size / EXTENT) as u32;
        extents.retain(|extent| *extent < first);
        extents.extend(first..size.div_ceil(EXTENT) as u32);
        let pages = |size: u64| size.div_ceil(EXTENT).div_ceil(PAGE_BITS) as u32;
        torn.extend(pages(header.size)..pages(size));
    }
    Loaded { verdict: Verdict::Good(Box::new(header)), serial, slot, extents, torn, rewrite: false }
}

#[cfg(test)]
mod tests {
    use afterimage_wire::intent::encode_page;

    use super::*;

    const DISK: DiskId = DiskId([1; 16]);
    const STREAM: StreamId = StreamId([2; 16]);
    const SIZE: u64 = 10 * EXTENT;

    fn log(headers: [Option<IntentHeader>; 2], set: &[usize]) -> Vec<u8> {
        let mut bytes = vec![0; log_len(SIZE) as usize];
        for (slot, header) in headers.iter().enumerate() {
            if let Some(header) = header {
                bytes[slot * ALIGN..][..ALIGN].copy_from_slice(&header.encode());
            }
        }
        let mut bits = vec![0; (PAGE_BITS / 8) as usize];
        for bit in set {
            bits[bit / 8] |= 1 << (bit % 8);
        }
        encode_page(0, 0, &bits, &mut bytes[PAGES_AT as usize..][..ALIGN]);
        bytes
    }

    fn header(serial: u64) -> IntentHeader {
        IntentHeader { serial, disk: DISK, size: SIZE, stream: STREAM, ..IntentHeader::default() }
    }

    #[test]
    fn the_newest_valid_header_counts() {
        let mut bytes = log([Some(header(8)), Some(header(9))], &[1, 9]);
        let loaded = load(&bytes, DISK, SIZE, STREAM);
        assert_eq!((loaded.serial, loaded.extents, loaded.rewrite), (9, vec![1, 9], false));
        bytes[ALIGN + 100] ^= 1;
        assert_eq!(load(&bytes, DISK, SIZE, STREAM).serial, 8);
    }

    #[test]
    fn another_disk_size_or_stream_is_foreign_and_its_serial_is_kept() {
        let bytes = log([Some(header(8)), None], &[1]);
        for loaded in [
            load(&bytes, DiskId([9; 16]), SIZE, STREAM),
            load(&bytes, DISK, SIZE - 4096, STREAM),
            load(&bytes[..ALIGN], DISK, SIZE + EXTENT, STREAM),
            load(&bytes, DISK, SIZE, StreamId([9; 16])),
            load(&bytes[..ALIGN * 2], DISK, SIZE, STREAM),
        ] {
            assert!(matches!(loaded.verdict, Verdict::Foreign(_)));
            assert_eq!((loaded.serial, loaded.extents.len(), loaded.rewrite), (8, 0, true));
        }
    }

    #[test]
    fn what_a_disk_has_grown_by_is_set() {
        let bytes = log([Some(header(8)), None], &[1, 9]);
        let loaded = load(&bytes, DISK, SIZE + EXTENT / 2, STREAM);
        assert!(matches!(loaded.verdict, Verdict::Good(_)));
        assert_eq!((loaded.extents, loaded.torn), (vec![1, 9, 10], vec![]));
        // From the middle of an extent, and over the border of a page.
        let half = IntentHeader { size: SIZE - 4096, ..header(8) };
        let bytes = log([Some(half), None], &[1]);
        let loaded = load(&bytes, DISK, (PAGE_BITS + 1) * EXTENT, STREAM);
        assert_eq!((loaded.extents[..2].to_vec(), loaded.extents.len()), (vec![1, 9], PAGE_BITS as usize + 1 - 8));
        assert_eq!(loaded.torn, [1]);
    }

    #[test]
    fn an_empty_file_is_missing_and_garbage_is_foreign() {
        assert_eq!(load(&[], DISK, SIZE, STREAM).verdict, Verdict::Missing);
        assert_eq!(load(&vec![0; 12288], DISK, SIZE, STREAM).verdict, Verdict::Missing);
        assert!(matches!(load(&vec![7; 12288], DISK, SIZE, STREAM).verdict, Verdict::Foreign(_)));
    }

    #[test]
    fn a_torn_page_counts_as_all_set() {
        let mut bytes = log([Some(header(1)), None], &[3]);
        bytes[PAGES_AT as usize + 50] ^= 1;
        let loaded = load(&bytes, DISK, SIZE, STREAM);
        assert_eq!(loaded.extents, (0..10).collect::<Vec<_>>());
        assert_eq!(loaded.torn, [0]);
    }
}
