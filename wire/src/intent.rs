//! The write-intent log: beside each source disk, which extents may differ from the replica.
//!
//! ```text
//! 0      header slot A (4096 bytes)
//! 4096   header slot B (4096 bytes)      the valid slot with the higher `serial` counts
//! 8192   pages of 4096 bytes: magic "AIIP", page u32, crc u32, stamp u32, then 4080 bytes of bits, one per
//!        extent, lowest bit first
//! ```
//! Each write of the log, of a header or of a page, has a serial, one more than the write before: the whole of it stands in
//! a header, its lower half as the stamp of a page. How far they go tells an older copy of the log from the newest, against
//! the [`Witness`] in another file.
//!
//! Version 1 had no stamps (0), and no identity of the log's file; version 2 had no promise. Both are read, and written anew
//! as version 3.
//!
//! A page that fails its CRC (torn) counts as all set. A bit is durable before the first write into its extent is
//! issued, and is cleared only after the header that names the acknowledged place covering it is durable.

use bytes::{Buf, BufMut};

use crate::ids::{DiskId, IncarnationId, StreamId};
use crate::segment::Predecessor;
use crate::{ALIGN, FormatError, MAX_NUMBER, get_id, get_number, need};

/// Version of the log that is written.
pub const INTENT_VERSION: u16 = 3;
/// Oldest version that is read.
const OLDEST_VERSION: u16 = 1;
/// Version of a witness.
const WITNESS_VERSION: u16 = 1;

/// First bytes of a header slot.
pub const INTENT_MAGIC: [u8; 4] = *b"AIIL";
/// First bytes of a page.
pub const PAGE_MAGIC: [u8; 4] = *b"AIIP";
/// First bytes of a witness.
pub const WITNESS_MAGIC: [u8; 4] = *b"AIIW";
/// Bytes of disk that one bit stands for.
pub const EXTENT: u64 = 4 * 1024 * 1024;
/// Bits in one page.
pub const PAGE_BITS: u64 = (ALIGN as u64 - 16) * 8;
/// Where the pages begin in the file.
pub const PAGES_AT: u64 = 2 * ALIGN as u64;

/// A header slot, taken apart.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct IntentHeader {
    /// Rises with each write of a header or page.
    pub serial: u64,
    /// The disk.
    pub disk: DiskId,
    /// Its size, bytes.
    pub size: u64,
    /// Stream that the disk is in.
    pub stream: StreamId,
    /// Newest writer that may have sent anything: durable here before its first frame leaves.
    pub incarnation: IncarnationId,
    /// `boot_id` of the kernel under which it ran: another one means that the host lost power or was rebooted.
    pub boot: [u8; 16],
    /// Last frame of `incarnation` known to be acknowledged; it covers every cleared bit.
    pub acked_frame: u64,
    /// Last record in that frame.
    pub acked_seq: u64,
    /// No record number above this one has left the source.
    pub reserved_seq: u64,
    /// Number of the newest cut, not below the true one.
    pub cut: u64,
    /// Count of synchronisations begun.
    pub sync: u64,
    /// The disk's generation under which it was written.
    pub generation: u64,
    /// A synchronisation of the whole disk is owed: it has not reached its end.
    pub whole_owed: bool,
    /// The writer stopped cleanly: everything was acknowledged.
    pub clean: bool,
    /// A synchronisation has begun whose end is not acknowledged: the target may hold its begin, so the next writer owes
    /// an end, even if no bit is set.
    pub sync_owed: bool,
    /// Of the whole synchronisation that is owed, the bits say what is left: all were set, durably, when it was owed.
    /// Without it, it begins at zero.
    pub mapped: bool,
    /// The target held a newer generation than `generation`: the disk is not this source's any more.
    pub fenced: bool,
    /// The stream says (or is about to say) that the disk has left it: only a synchronisation of the whole disk brings it
    /// back.
    pub left: bool,
    /// At clean stop: when the disk's file last changed (nanoseconds), or how much had been written to a device since the
    /// boot; used without us if it differs.
    pub mtime_ns: u64,
    /// The writer before `incarnation` and its last acknowledged place: while nothing of `incarnation` is acknowledged,
    /// the target may still hold only this.
    pub prior: Predecessor,
    /// Stopped cleanly, but not everything was acknowledged: the rest, up to this place, is in the spill. Bits may be
    /// set then; nothing is in doubt if the spill is found to reach to exactly here. NONE otherwise.
    pub spilled: Predecessor,
    /// Wall clock of this host at a recent moment when every write was in a durable restore point of all disks; 0 if
    /// there never was one. A restart counts its RPO from here.
    pub complete_wall_ns: u64,
    /// Which file or device the disk is, as the system tells them apart; 0 if it does not. Another one has been put in its
    /// place if it differs.
    pub identity: u64,
    /// When the newest word of target or coordinator was asked for that confirmed the generation, nanoseconds since
    /// `boot` (time asleep counts); 0 for never. Kept for groups with a lease only.
    pub lease_at: u64,
    /// Which file this log is, as the system tells files apart; 0 if it does not, or in version 1. A copy differs.
    pub log_identity: u64,
    /// Longest deadline of synchronous mode that a frame of this writer, or of one before that no target has ended the
    /// promises of, may name, milliseconds; 0 for none. The next process keeps it before it answers a write.
    pub promised_ms: u32,
}

impl IntentHeader {
    /// One slot.
    pub fn encode(&self) -> [u8; ALIGN] {
        let mut page = [0; ALIGN];
        let mut out = &mut page[..];
        out.put_slice(&INTENT_MAGIC);
        out.put_u16_le(INTENT_VERSION);
        out.put_u16_le(0);
        out.put_u32_le(0); // CRC, below
        out.put_u32_le(0);
        out.put_u64_le(self.serial);
        out.put_slice(&self.disk.0);
        out.put_u64_le(self.size);
        out.put_slice(&self.stream.0);
        out.put_slice(&self.incarnation.0);
        out.put_slice(&self.boot);
        out.put_u64_le(self.acked_frame);
        out.put_u64_le(self.acked_seq);
        out.put_u64_le(self.reserved_seq);
        out.put_u64_le(self.cut);
        out.put_u64_le(self.sync);
        out.put_u64_le(self.generation);
        out.put_u8(
            u8::from(self.whole_owed)
                | u8::from(self.clean) << 1
                | u8::from(self.sync_owed) << 2
                | u8::from(self.mapped) << 3
                | u8::from(self.fenced) << 4
                | u8::from(self.left) << 5,
        );
        out.put_u64_le(self.mtime_ns);
        self.prior.encode(&mut out);
        self.spilled.encode(&mut out);
        out.put_u64_le(self.complete_wall_ns);
        out.put_u64_le(self.identity);
        out.put_u64_le(self.lease_at);
        out.put_u64_le(self.log_identity);
        out.put_u32_le(self.promised_ms);
        let crc = crc32c::crc32c(&page);
        page[8..12].copy_from_slice(&crc.to_le_bytes());
        page
    }

    /// Reads a slot.
    ///
    /// # Errors
    /// Foreign, torn, of another version: the slot does not count.
    pub fn decode(page: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "write-intent log";
        need(&page, ALIGN, WHAT)?;
        let page = &page[..ALIGN];
        if page[..4] != INTENT_MAGIC {
            return Err(FormatError::Magic { what: WHAT });
        }
        check_crc(page, WHAT)?;
        let mut input = &page[4..];
        let version = input.get_u16_le();
        if !(OLDEST_VERSION..=INTENT_VERSION).contains(&version) {
            return Err(FormatError::Version { what: WHAT, found: version, known: INTENT_VERSION });
        }
        input.advance(10);
        let serial = get_number(&mut input, WHAT)?;
        let disk = DiskId(get_id(&mut input, WHAT)?);
        let size = input.get_u64_le();
        let stream = StreamId(get_id(&mut input, WHAT)?);
        let incarnation = IncarnationId(get_id(&mut input, WHAT)?);
        let boot = get_id(&mut input, WHAT)?;
        let acked_frame = get_number(&mut input, WHAT)?;
        let acked_seq = get_number(&mut input, WHAT)?;
        let reserved_seq = get_number(&mut input, WHAT)?;
        let cut = get_number(&mut input, WHAT)?;
        let sync = get_number(&mut input, WHAT)?;
        let generation = get_number(&mut input, WHAT)?;
        let bits = input.get_u8();
        if bits & !63 != 0 {
            return Err(FormatError::Malformed { what: WHAT, detail: "unknown bits" });
        }
        Ok(Self {
            serial,
            disk,
            size,
            stream,
            incarnation,
            boot,
            acked_frame,
            acked_seq,
            reserved_seq,
            cut,
            sync,
            generation,
            whole_owed: bits & 1 != 0,
            clean: bits & 2 != 0,
            sync_owed: bits & 4 != 0,
            mapped: bits & 8 != 0,
            fenced: bits & 16 != 0,
            left: bits & 32 != 0,
            mtime_ns: input.get_u64_le(),
            prior: Predecessor::read(&mut input, WHAT)?,
            spilled: Predecessor::read(&mut input, WHAT)?,
            complete_wall_ns: input.get_u64_le(),
            identity: input.get_u64_le(),
            lease_at: get_number(&mut input, WHAT)?,
            log_identity: if version == 1 { 0 } else { input.get_u64_le() },
            promised_ms: if version < 3 { 0 } else { input.get_u32_le() },
        })
    }
}

fn check_crc(page: &[u8], what: &'static str) -> Result<(), FormatError> {
    if crate::crc_without(page, 8).to_le_bytes() == page[8..12] { Ok(()) } else { Err(FormatError::Checksum { what }) }
}

/// Fills `page` (4096 bytes) with page `number` of the bitmap, written as write `serial` of the log; `bits` are its 4080
/// bytes.
///
/// # Panics
/// If a slice has another length.
pub fn encode_page(number: u32, serial: u64, bits: &[u8], page: &mut [u8]) {
    page[..4].copy_from_slice(&PAGE_MAGIC);
    page[4..8].copy_from_slice(&number.to_le_bytes());
    page[8..12].fill(0);
    page[12..16].copy_from_slice(&(serial as u32).to_le_bytes());
    page[16..].copy_from_slice(bits);
    let crc = crc32c::crc32c(page);
    page[8..12].copy_from_slice(&crc.to_le_bytes());
}

/// The bits of page `number`.
///
/// # Errors
/// Foreign, torn, or another page: all its extents count as set.
pub fn decode_page(number: u32, page: &[u8]) -> Result<&[u8], FormatError> {
    const WHAT: &str = "page of the write-intent log";
    need(&page, ALIGN, WHAT)?;
    let page = &page[..ALIGN];
    if page[..4] != PAGE_MAGIC {
        return Err(FormatError::Magic { what: WHAT });
    }
    check_crc(page, WHAT)?;
    if page[4..8] != number.to_le_bytes() {
        return Err(FormatError::Malformed { what: WHAT, detail: "another page" });
    }
    Ok(&page[16..])
}

/// The serial of the write that a valid page is of, given that of the log's newest header, from which it is less than 2^31
/// away; none in a page of version 1.
pub fn page_serial(page: &[u8], header: u64) -> Option<u64> {
    let stamp = u32::from_le_bytes(page.get(12..16)?.try_into().ok()?);
    let ahead = stamp.wrapping_sub(header as u32) as i32;
    (stamp != 0).then(|| header.saturating_add_signed(ahead.into()).min(MAX_NUMBER))
}

/// What a log has been seen to have reached: kept in another file than the log, and never ahead of it. A log that has not
/// come as far is an older copy.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Witness {
    /// The disk.
    pub disk: DiskId,
    /// Stream that the disk is in.
    pub stream: StreamId,
    /// Serial of a write of the log that is durable.
    pub serial: u64,
}

impl Witness {
    /// The file.
    pub fn encode(&self) -> [u8; ALIGN] {
        let mut page = [0; ALIGN];
        let mut out = &mut page[..];
        out.put_slice(&WITNESS_MAGIC);
        out.put_u16_le(WITNESS_VERSION);
        out.put_u16_le(0);
        out.put_u32_le(0); // CRC, below
        out.put_u32_le(0);
        out.put_slice(&self.disk.0);
        out.put_slice(&self.stream.0);
        out.put_u64_le(self.serial);
        let crc = crc32c::crc32c(&page);
        page[8..12].copy_from_slice(&crc.to_le_bytes());
        page
    }

    /// Reads the file.
    ///
    /// # Errors
    /// Foreign, torn, of another version: it says nothing.
    pub fn decode(page: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "witness of a write-intent log";
        need(&page, ALIGN, WHAT)?;
        let page = &page[..ALIGN];
        if page[..4] != WITNESS_MAGIC {
            return Err(FormatError::Magic { what: WHAT });
        }
        check_crc(page, WHAT)?;
        let mut input = &page[4..];
        let version = input.get_u16_le();
        if version != WITNESS_VERSION {
            return Err(FormatError::Version { what: WHAT, found: version, known: WITNESS_VERSION });
        }
        input.advance(10);
        let disk = DiskId(get_id(&mut input, WHAT)?);
        let stream = StreamId(get_id(&mut input, WHAT)?);
        Ok(Self { disk, stream, serial: get_number(&mut input, WHAT)? })
    }
}
