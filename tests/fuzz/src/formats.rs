//! Every structure of `docs/format.md`. Each body reads the bytes as they are, and once more with magic number, version,
//! length and checksum set right, as an attacker or a bug would have them. What is read must encode to what reads the
//! same, and hold the promises of its decoder.

use afterimage_wire::chunk::Chunk;
use afterimage_wire::control::Control;
use afterimage_wire::damage::{DAMAGE_MAGIC, DamageFile};
use afterimage_wire::frame::{FRAME_MAGIC, FrameHeader, MAX_FRAME, check_frame};
use afterimage_wire::handshake::Handshake;
use afterimage_wire::intent::{
    INTENT_MAGIC, IntentHeader, PAGE_MAGIC, WITNESS_MAGIC, Witness, decode_page, page_serial,
};
use afterimage_wire::keys::{KEYS_MAGIC, KeysFile};
use afterimage_wire::record::{Cut, DiskInfo, RECORD_LEN, RawRecord, Record, SyncMark};
use afterimage_wire::segment::{SEGMENT_MAGIC, SegmentHead, WrappedKey};
use afterimage_wire::stream_state::{STATE_MAGIC, StreamStateFile};
use afterimage_wire::timeline::{TIMELINE_MAGIC, TimelineTable};
use zerocopy::FromBytes;

use crate::forge::{mend, signed};

/// Records and the payloads of records: cut, disk, mark of a synchronisation.
pub fn record(data: &[u8]) {
    if let Ok((raw, _)) = RawRecord::ref_from_prefix(data)
        && let Ok(record) = Record::from_raw(raw)
    {
        assert_eq!(&record.to_raw(), raw);
        assert!(record.end() >= record.offset);
    }
    let payload = data.get(RECORD_LEN..).unwrap_or_default();
    for bytes in [data, payload] {
        let mut out = Vec::new();
        if let Ok(cut) = Cut::decode(bytes) {
            cut.encode(&mut out);
            assert_eq!(out, bytes);
        }
        out.clear();
        if let Ok(disk) = DiskInfo::decode(bytes) {
            disk.encode(&mut out);
            assert_eq!(out, bytes);
            assert!(disk.block.is_power_of_two() && disk.size.is_multiple_of(disk.block.into()));
        }
        out.clear();
        if let Ok(mark) = SyncMark::decode(bytes) {
            mark.encode(&mut out);
            assert_eq!(out, bytes);
        }
    }
}

/// A chunk, opened.
pub fn chunk(data: &[u8]) {
    let Ok(chunk) = Chunk::parse(data) else { return };
    for record in chunk.records().flatten() {
        assert!(record.payload_at as usize + record.payload_len as usize <= chunk.plain_len);
    }
    let mut out = Vec::new();
    if let Ok(plain) = afterimage_dataplane::seal::payload(&chunk, &mut out) {
        assert_eq!(plain.len(), chunk.plain_len);
        for record in chunk.records().flatten() {
            let _ = afterimage_dataplane::seal::record_payload(&record, plain);
        }
    }
}

/// A frame: header and directory.
pub fn frame(data: &[u8]) {
    read_frame(data);
    read_frame(&signed(&data[..data.len().min(MAX_FRAME)], FRAME_MAGIC, 8, 12, true));
}

fn read_frame(bytes: &[u8]) {
    if let Ok(header) = FrameHeader::parse(bytes) {
        assert!(header.number.get() > header.acked.get() && header.first_seq <= header.last_seq);
        // What follows a frame has a number, too.
        assert!(header.number.get().checked_add(1).is_some() && header.last_seq.get().checked_add(1).is_some());
    }
    if let Ok((header, directory)) = check_frame(bytes) {
        assert_eq!(header.length.get() as usize, bytes.len());
        for entry in directory {
            assert!(entry.at.get() as usize + entry.sealed_len.get() as usize <= bytes.len());
        }
    }
}

/// The head of a segment, and a wrapped key.
pub fn segment(data: &[u8]) {
    for bytes in [data.to_vec(), signed(data, SEGMENT_MAGIC, 8, 12, true)] {
        if let Ok(length) = SegmentHead::length(&bytes) {
            assert!(length > 0);
        }
        if let Ok((head, length)) = SegmentHead::decode(&bytes) {
            assert!(length <= bytes.len());
            let again = SegmentHead::decode(&head.encode()).expect("what was read can be written");
            assert_eq!(again.0, head);
        }
    }
    if let Ok(key) = WrappedKey::read(&mut &data[..]) {
        let mut out = Vec::new();
        key.encode(&mut out);
        assert_eq!(WrappedKey::read(&mut &out[..]), Ok(key));
    }
}

/// Messages of the handshake, as they come and with their length and magic number set right.
pub fn handshake(data: &[u8]) {
    read_handshake(data);
    let mut bytes = (data.len() as u32).to_le_bytes().to_vec();
    bytes.extend(data);
    read_handshake(&bytes);
    let mut bytes = vec![0, 0, 0, 0, 1, b'A', b'I', b'H', b'I', 1, 0];
    bytes.extend(data);
    let length = (bytes.len() - 4) as u32;
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    read_handshake(&bytes);
}

fn read_handshake(bytes: &[u8]) {
    if let Ok(Some((message, length))) = Handshake::read(bytes) {
        assert!(length <= bytes.len());
        let again = message.encode();
        let length = again.len();
        assert_eq!(Handshake::read(&again), Ok(Some((message, length))));
    }
}

/// A control message, opened.
pub fn control(data: &[u8]) {
    if let Ok(message) = Control::decode(data) {
        assert_eq!(Control::decode(&message.encode()), Ok(message));
    }
}

/// Headers and pages of a write-intent log.
pub fn intent(data: &[u8]) {
    for bytes in [data.to_vec(), signed_page(data, INTENT_MAGIC)] {
        if let Ok(header) = IntentHeader::decode(&bytes) {
            // What is written is the newest version, whatever was read.
            assert_eq!(IntentHeader::decode(&header.encode()), Ok(header));
            let _ = page_serial(data, header.serial);
        }
    }
    if let Ok(witness) = Witness::decode(&signed_page(data, WITNESS_MAGIC)) {
        assert_eq!(Witness::decode(&witness.encode()), Ok(witness));
    }
    let number = data.get(4..8).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let _ = decode_page(number, data);
    let mut page = data.to_vec();
    page.resize(4096, 0);
    page[..4].copy_from_slice(&PAGE_MAGIC);
    mend(&mut page, 8);
    let _ = decode_page(number, &page);
}

fn signed_page(data: &[u8], magic: [u8; 4]) -> Vec<u8> {
    let mut page = data.to_vec();
    page.resize(4096, 0);
    page[..4].copy_from_slice(&magic);
    page[4..6].copy_from_slice(&afterimage_wire::WIRE_VERSION.to_le_bytes());
    mend(&mut page, 8);
    page
}

/// The timeline table, and the keys file.
pub fn timeline(data: &[u8]) {
    for bytes in [data.to_vec(), signed(data, KEYS_MAGIC, 12, 8, false)] {
        if let Ok(file) = KeysFile::decode(&bytes) {
            assert_eq!(KeysFile::decode(&file.encode()).as_ref(), Ok(&file));
        }
    }
    for bytes in [data.to_vec(), signed(data, TIMELINE_MAGIC, 12, 8, false)] {
        if let Ok(table) = TimelineTable::decode(&bytes) {
            assert_eq!(TimelineTable::decode(&table.encode()).as_ref(), Ok(&table));
        }
    }
}

/// The stream state.
pub fn stream_state(data: &[u8]) {
    for bytes in [data.to_vec(), signed(data, STATE_MAGIC, 12, 8, false)] {
        if let Ok(state) = StreamStateFile::decode(&bytes) {
            assert_eq!(StreamStateFile::decode(&state.encode()).as_ref(), Ok(&state));
        }
    }
}

/// The list of what cannot be read any more.
pub fn damage(data: &[u8]) {
    let mut second = signed(data, DAMAGE_MAGIC, 12, 8, false);
    second[4] = 2;
    mend(&mut second, 8);
    for bytes in [data.to_vec(), signed(data, DAMAGE_MAGIC, 12, 8, false), second] {
        if let Ok(list) = DamageFile::decode(&bytes) {
            assert_eq!(DamageFile::decode(&list.encode()).as_ref(), Ok(&list));
        }
    }
}
