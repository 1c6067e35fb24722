//! The write-intent log: beside each source disk, which extents may differ from the replica.
//!
//! ```text
//! 0      header slot A (4096 bytes)
//! 4096   header slot B (4096 bytes)      the valid slot with the higher `serial` counts
//! 8192   pages of 4096 bytes: magic "AIIP", page u32, crc u32, reserved u32, then 4080 bytes of bits, one per
//!        extent, lowest bit first
//! ```
//! A page that fails its CRC (torn) counts as all set. A bit is durable before the first write into its extent is
//! issued, and is cleared only after the header that names the acknowledged place covering it is durable.

use bytes::{Buf, BufMut};

use crate::ids::{DiskId, IncarnationId, StreamId};
use crate::segment::Predecessor;
use crate::{ALIGN, FormatError, WIRE_VERSION, get_id, get_number, need};

/// First bytes of a header slot.
pub const INTENT_MAGIC: [u8; 4] = *b"AIIL";
/// First bytes of a page.
pub const PAGE_MAGIC: [u8; 4] = *b"AIIP";
/// Bytes of disk that one bit stands for.
pub const EXTENT: u64 = 4 * 1024 * 1024;
/// Bits in one page.
pub const PAGE_BITS: u64 = (ALIGN as u64 - 16) * 8;
/// Where the pages begin in the file.
pub const PAGES_AT: u64 = 2 * ALIGN as u64;

/// A header slot, taken apart.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct IntentHeader {
    /// Rises with each write of a header.
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
}

impl IntentHeader {
    /// One slot.
    pub fn encode(&self) -> [u8; ALIGN] {
        let mut page = [0; ALIGN];
        let mut out = &mut page[..];
        out.put_slice(&INTENT_MAGIC);
        out.put_u16_le(WIRE_VERSION);
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
        if version != WIRE_VERSION {
            return Err(FormatError::Version { what: WHAT, found: version, known: WIRE_VERSION });
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
        })
    }
}

fn check_crc(page: &[u8], what: &'static str) -> Result<(), FormatError> {
    if crate::crc_without(page, 8).to_le_bytes() == page[8..12] { Ok(()) } else { Err(FormatError::Checksum { what }) }
}

/// Fills `page` (4096 bytes) with page `number` of the bitmap; `bits` are its 4080 bytes.
///
/// # Panics
/// If a slice has another length.
pub fn encode_page(number: u32, bits: &[u8], page: &mut [u8]) {
    page[..4].copy_from_slice(&PAGE_MAGIC);
    page[4..8].copy_from_slice(&number.to_le_bytes());
    page[8..16].fill(0);
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
