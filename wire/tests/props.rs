//! Round trips of everything that crosses a process, and hostile input: whatever the bytes, decoding ends with an error
//! or with a value that encodes and decodes to itself; it never panics.

use afterimage_wire::chunk::Chunk;
use afterimage_wire::control::{CONTROL_PLAIN_LEN, Control, StopReason};
use afterimage_wire::damage::DamageFile;
use afterimage_wire::frame::{FrameHeader, check_frame, frame_crc};
use afterimage_wire::handshake::{DiskClaim, Handshake, Hello, MAX_HANDSHAKE, Position, Refusal, Welcome};
use afterimage_wire::ids::{DiskId, IncarnationId, PolicyKeyId, StreamId, TimelineId};
use afterimage_wire::intent::{IntentHeader, Witness, decode_page, encode_page, page_serial};
use afterimage_wire::keys::{HeldKey, KeysFile, SEALED_KEY_LEN};
use afterimage_wire::record::{
    Cut, DiskInfo, HASH_LEN, HASH_STEP, MAX_HASHES, RECORD_LEN, RawRecord, Record, RecordKind, SyncMark, hashes,
};
use afterimage_wire::segment::{Predecessor, Sealed48, SegmentHead, WrappedKey};
use afterimage_wire::stream_state::{DeltaView, DiskLife, OpenSync, StreamStateFile, UnreadableRange};
use afterimage_wire::timeline::{DiskGeneration, Fence, Timeline, TimelineKind, TimelineTable};
use afterimage_wire::{ALIGN, MAX_NAME, MAX_NUMBER, WIRE_VERSION};
use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

fn id() -> impl Strategy<Value = [u8; 16]> {
    any::<[u8; 16]>().prop_filter("the id of nothing", |id| *id != [0; 16])
}

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0..=MAX_NUMBER, 1 => Just(MAX_NUMBER)]
}

fn name() -> impl Strategy<Value = String> {
    // `.` gives characters of up to four bytes, so the longest of these is just within `MAX_NAME`.
    ".{0,63}".prop_filter("longer than a name may be", |s| s.len() <= MAX_NAME)
}

prop_compose! {
    fn disk()(slot in any::<u16>(), id in id(), blocks in 0..1_u64 << 46, block in 9..=16_u32, physical in 9..=16_u32,
        serial in name(), name in name()) -> DiskInfo {
        DiskInfo { slot, id: DiskId(id), size: blocks << block, block: 1 << block, physical_block: 1 << physical, serial, name }
    }
}

prop_compose! {
    fn predecessor()(incarnation in any::<[u8; 16]>(), frame in number(), seq in number()) -> Predecessor {
        Predecessor { incarnation: IncarnationId(incarnation), frame, seq }
    }
}

prop_compose! {
    fn wrapped()(policy_key in any::<[u8; 16]>(), nonce in any::<[u8; 12]>(), low in any::<[u8; 24]>(),
        high in any::<[u8; 24]>()) -> WrappedKey {
        let mut sealed = [0; 48];
        sealed[..24].copy_from_slice(&low);
        sealed[24..].copy_from_slice(&high);
        WrappedKey { policy_key: PolicyKeyId(policy_key), nonce, sealed: Sealed48(sealed) }
    }
}

prop_compose! {
    fn record()(seq in number(), kind in 1..=14_u8, disk in any::<u16>(), len in 1..=u32::MAX, at in any::<u64>(),
        mono_ns in any::<u64>(), wall_ns in any::<u64>(), payload_at in any::<u32>(), payload in any::<u32>(),
        crc in any::<u32>()) -> Record {
        use RecordKind::*;
        let kind = RecordKind::from_u8(kind).expect("1 to 14 are kinds");
        let len = if kind == SyncHash { 1 + (len - 1) % (MAX_HASHES as u32 * HASH_STEP) } else { len };
        let payload_len = match kind {
            Write | SyncWrite => len,
            SyncHash => (hashes(len) * HASH_LEN) as u32,
            Zero | Discard | SyncZero | Leave | Unreadable => 0,
            _ => payload,
        };
        let offset = at.min(u64::MAX - u64::from(len));
        Record { seq, kind, disk, offset, len, mono_ns, wall_ns, payload_at, payload_len, crc }
    }
}

prop_compose! {
    fn cut()(number in number(), clock_synced in any::<bool>(), flush_clean in any::<bool>(), label in name()) -> Cut {
        Cut { number, clock_synced, flush_clean, label }
    }
}

prop_compose! {
    fn segment()(stream in id(), timeline in id(), incarnation in id(), predecessor in predecessor(),
        numbers in prop::array::uniform4(number()), key in wrapped(), disks in prop::collection::vec(disk(), 0..20)) -> SegmentHead {
        let [segment, first_frame, first_seq, created_wall_ns] = numbers;
        SegmentHead {
            stream: StreamId(stream), timeline: TimelineId(timeline), incarnation: IncarnationId(incarnation),
            predecessor, segment, first_frame, first_seq, created_wall_ns, key, disks,
        }
    }
}

prop_compose! {
    fn hello()(stream in id(), incarnation in id(), predecessor in predecessor(), key in wrapped(),
        first_seq in 1..=MAX_NUMBER, next_frame in 1..=MAX_NUMBER, connection in any::<u16>(),
        disks in prop::collection::vec((disk(), number()), 0..20)) -> Handshake {
        Handshake::Hello(Hello {
            version: WIRE_VERSION, stream: StreamId(stream), incarnation: IncarnationId(incarnation), predecessor, key,
            first_seq, next_frame, connection,
            disks: disks.into_iter().map(|(disk, generation)| DiskClaim { disk, generation }).collect(),
        })
    }
}

fn refusal() -> impl Strategy<Value = Refusal> {
    prop_oneof![
        Just(Refusal::UnknownStream),
        any::<u16>().prop_map(|known| Refusal::Version { known }),
        (id(), number()).prop_map(|(d, generation)| Refusal::Fenced { disk: DiskId(d), generation }),
        Just(Refusal::Branch),
        number().prop_map(|newest| Refusal::SeqBehind { newest }),
        Just(Refusal::Busy),
        Just(Refusal::Unable),
        Just(Refusal::BadClaim),
    ]
}

fn handshake() -> impl Strategy<Value = Handshake> {
    prop_oneof![
        hello(),
        (any::<[u8; 16]>(), any::<[u8; 16]>(), number(), number(), any::<bool>()).prop_map(
            |(timeline, incarnation, frame, seq, whole_resync)| Handshake::Welcome(Welcome::Accepted {
                timeline: TimelineId(timeline),
                position: Position { incarnation: IncarnationId(incarnation), frame, seq },
                whole_resync,
            })
        ),
        (refusal(), name()).prop_map(|(reason, message)| Handshake::Welcome(Welcome::Refused { reason, message })),
        Just(Handshake::Begin),
    ]
}

fn control() -> impl Strategy<Value = Control> {
    let reason = prop::sample::select(vec![
        StopReason::Fenced,
        StopReason::BadFrame,
        StopReason::NoSpace,
        StopReason::JournalFailed,
        StopReason::Replaced,
        StopReason::ShuttingDown,
    ]);
    prop_oneof![
        Just(Control::Ready),
        Just(Control::Alive),
        (number(), number()).prop_map(|(frame, seq)| Control::Ack { frame, seq }),
        (reason, number()).prop_map(|(reason, value)| Control::Stop { reason, value }),
        (number(), any::<u64>()).prop_map(|(seq, differs)| Control::Compared { seq, differs }),
        (any::<u16>(), any::<u64>(), 1..u64::MAX)
            .prop_map(|(disk, at, len)| { Control::Want { disk, offset: at.min(u64::MAX - len), len } }),
    ]
}

prop_compose! {
    fn intent()(numbers in prop::array::uniform16(number()), log_identity in any::<u64>(), promised_ms in any::<u32>(), disk in id(), stream in id(), incarnation in id(), before in id(), end in id(), boot in any::<[u8; 16]>(),
        whole_owed in any::<bool>(), clean in any::<bool>(), sync_owed in any::<bool>(), mapped in any::<bool>(),
        fenced in any::<bool>(), left in any::<bool>()) -> IntentHeader {
        let [serial, size, acked_frame, acked_seq, reserved_seq, cut, sync, generation, mtime_ns, frame, seq, last, last_seq, complete_wall_ns, identity, lease_at] = numbers;
        IntentHeader {
            serial, disk: DiskId(disk), size, stream: StreamId(stream), incarnation: IncarnationId(incarnation), boot,
            acked_frame, acked_seq, reserved_seq, cut, sync, generation, whole_owed, clean, sync_owed, mapped, mtime_ns,
            prior: Predecessor { incarnation: IncarnationId(before), frame, seq },
            spilled: Predecessor { incarnation: IncarnationId(end), frame: last, seq: last_seq },
            complete_wall_ns,
            identity,
            fenced,
            left,
            lease_at,
            log_identity,
            promised_ms,
        }
    }
}

fn timeline() -> impl Strategy<Value = Timeline> {
    let kind = prop::sample::select(vec![
        TimelineKind::Source,
        TimelineKind::Failover,
        TimelineKind::View,
        TimelineKind::Losing,
    ]);
    (id(), any::<[u8; 16]>(), number(), kind, any::<u64>(), name()).prop_map(
        |(id, parent, fork_seq, kind, created_wall_ns, reason)| Timeline {
            id: TimelineId(id),
            parent: TimelineId(parent),
            fork_seq,
            kind,
            created_wall_ns,
            reason,
        },
    )
}

prop_compose! {
    fn fence()(numbers in prop::array::uniform3(number()), incarnation in id(), zero_loss in any::<bool>(),
        disks in prop::collection::vec(id(), 0..6), reason in name()) -> Fence {
        let [generation, seq, wall_ns] = numbers;
        let disks = disks.into_iter().map(DiskId).collect();
        Fence { generation, seq, incarnation: IncarnationId(incarnation), wall_ns, zero_loss, disks, reason }
    }
}

prop_compose! {
    fn table()(stream in id(), current in id(), fold_floor in number(),
        timelines in prop::collection::vec(timeline(), 0..12),
        disks in prop::collection::vec((disk(), number(), id(), any::<bool>()), 0..12),
        fences in prop::collection::vec(fence(), 0..6)) -> TimelineTable {
        TimelineTable {
            stream: StreamId(stream), current: TimelineId(current), fold_floor, timelines,
            disks: disks.into_iter().map(|(disk, generation, t, member)| {
                DiskGeneration { disk, generation, timeline: TimelineId(t), member }
            }).collect(),
            fences,
        }
    }
}

prop_compose! {
    fn held()(id in id(), site in any::<[[u8; 30]; 2]>(), recovery in any::<Option<[[u8; 30]; 2]>>()) -> HeldKey {
        let whole = |halves: [[u8; 30]; 2]| -> [u8; SEALED_KEY_LEN] { halves.concat().try_into().unwrap() };
        HeldKey { id: PolicyKeyId(id), site: whole(site), recovery: recovery.map(whole) }
    }
}

prop_compose! {
    fn keys()(stream in id(), site_key in id(), recovery_key in id(), retention_s in number(), name in "[a-z0-9-]{0,63}",
        keys in prop::collection::vec(held(), 0..6),
        disks in prop::collection::vec((disk(), number()), 0..6)) -> KeysFile {
        KeysFile { stream: StreamId(stream), site_key, recovery_key, retention_s, name, keys, disks }
    }
}

fn open_sync() -> impl Strategy<Value = OpenSync> {
    (number(), any::<bool>(), any::<bool>()).prop_map(|(sync, whole, tainted)| OpenSync { sync, whole, tainted })
}

fn life() -> impl Strategy<Value = DiskLife> {
    (disk(), any::<bool>(), any::<bool>(), prop::collection::vec(open_sync(), 0..4))
        .prop_map(|(info, member, owes_whole, open)| DiskLife { info, member, owes_whole, open })
}

fn delta() -> impl Strategy<Value = DeltaView> {
    let kind = prop::sample::select(vec![TimelineKind::Failover, TimelineKind::View]);
    (id(), number(), kind, any::<bool>(), name(), prop::collection::vec(id().prop_map(DiskId), 0..4)).prop_map(
        |(timeline, seq, kind, removing, name, disks)| DeltaView {
            timeline: TimelineId(timeline),
            seq,
            kind,
            removing,
            name,
            disks,
        },
    )
}

fn unreadable() -> impl Strategy<Value = UnreadableRange> {
    (any::<u16>(), any::<u64>(), any::<u64>()).prop_map(|(slot, offset, len)| UnreadableRange {
        slot,
        offset,
        len: len.min(u64::MAX - offset),
    })
}

prop_compose! {
    fn state()(stream in id(), floor in number(), newest_cut in number(), disks in prop::collection::vec(life(), 0..6),
        incarnations in prop::collection::vec(id(), 0..6), views in prop::collection::vec(delta(), 0..4),
        unreadable in prop::collection::vec(unreadable(), 0..6)) -> StreamStateFile {
        let incarnations = incarnations.into_iter().map(IncarnationId).collect();
        StreamStateFile { stream: StreamId(stream), floor, newest_cut, disks, incarnations, views, unreadable }
    }
}

proptest! {
    #[test]
    fn stream_states_come_back(state in state(), padding in 0..5000_usize) {
        let mut bytes = state.encode();
        bytes.resize(bytes.len() + padding, 0);
        prop_assert_eq!(StreamStateFile::decode(&bytes), Ok(state));
    }

    #[test]
    fn records_come_back(record in record()) {
        prop_assert_eq!(Record::from_raw(&record.to_raw()), Ok(record));
    }

    #[test]
    fn cuts_come_back(cut in cut()) {
        let mut bytes = Vec::new();
        cut.encode(&mut bytes);
        prop_assert_eq!(Cut::decode(&bytes), Ok(cut));
        prop_assert!(Cut::decode(&bytes[..bytes.len() - 1]).is_err());
    }

    #[test]
    fn disks_come_back(disk in disk()) {
        let mut bytes = Vec::new();
        disk.encode(&mut bytes);
        prop_assert_eq!(DiskInfo::decode(&bytes), Ok(disk));
        prop_assert!(DiskInfo::decode(&bytes[..bytes.len() - 1]).is_err());
    }

    #[test]
    fn sync_marks_come_back(sync in number(), whole in any::<bool>()) {
        let mut bytes = Vec::new();
        SyncMark { sync, whole }.encode(&mut bytes);
        prop_assert_eq!(SyncMark::decode(&bytes), Ok(SyncMark { sync, whole }));
    }

    #[test]
    fn segment_heads_come_back(head in segment()) {
        let bytes = head.encode();
        prop_assert!(bytes.len() % ALIGN == 0);
        prop_assert_eq!(SegmentHead::length(&bytes), Ok(bytes.len()));
        prop_assert_eq!(SegmentHead::decode(&bytes), Ok((head, bytes.len())));
    }

    #[test]
    fn handshakes_come_back(message in handshake(), more in prop::collection::vec(any::<u8>(), 0..40)) {
        let mut bytes = message.encode();
        let length = bytes.len();
        prop_assert!(length <= MAX_HANDSHAKE);
        for cut in [0, 1, 3, 4, length - 1] {
            prop_assert_eq!(Handshake::read(&bytes[..cut.min(length - 1)]), Ok(None));
        }
        bytes.extend(more);
        prop_assert_eq!(Handshake::read(&bytes), Ok(Some((message, length))));
    }

    #[test]
    fn controls_come_back(message in control()) {
        prop_assert_eq!(Control::decode(&message.encode()), Ok(message));
    }

    #[test]
    fn intent_headers_come_back(header in intent()) {
        prop_assert_eq!(IntentHeader::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn intent_pages_come_back(number in any::<u32>(), other in any::<u32>(), serial in 1..1_u64 << 62, near in -(1_i64 << 31)..1 << 31,
        bits in prop::collection::vec(any::<u8>(), ALIGN - 16)) {
        let mut page = vec![0xee; ALIGN];
        encode_page(number, serial, &bits, &mut page);
        let header = serial.saturating_add_signed(near);
        if serial as u32 != 0 && header < serial + (1 << 31) {
            prop_assert_eq!(page_serial(&page, header), Some(serial));
        }
        prop_assert_eq!(decode_page(number, &page), Ok(&bits[..]));
        prop_assert!(other == number || decode_page(other, &page).is_err());
    }

    #[test]
    fn witnesses_come_back(disk in id(), stream in id(), serial in number()) {
        let witness = Witness { disk: DiskId(disk), stream: StreamId(stream), serial };
        prop_assert_eq!(Witness::decode(&witness.encode()), Ok(witness));
    }

    #[test]
    fn timeline_tables_come_back(table in table(), padding in 0..5000_usize) {
        let mut bytes = table.encode();
        bytes.resize(bytes.len() + padding, 0);
        prop_assert_eq!(TimelineTable::decode(&bytes), Ok(table));
    }

    #[test]
    fn keys_files_come_back(file in keys(), padding in 0..5000_usize) {
        let mut bytes = file.encode();
        bytes.resize(bytes.len() + padding, 0);
        prop_assert_eq!(KeysFile::decode(&bytes), Ok(file));
    }

    #[test]
    fn names_too_long_are_cut_at_a_character(text in ".{0,400}") {
        let cut = Cut { number: 1, label: text.clone(), ..Cut::default() };
        let mut bytes = Vec::new();
        cut.encode(&mut bytes);
        let back = Cut::decode(&bytes).expect("what was encoded can be read");
        prop_assert!(text.starts_with(&back.label));
        prop_assert!(back.label.len() == text.len() || back.label.len() + 4 > MAX_NAME);
    }
}

/// Everything that decodes, on the same bytes. What comes out must survive being encoded again.
fn decode_all(bytes: &[u8]) -> Result<(), TestCaseError> {
    if let Ok(cut) = Cut::decode(bytes) {
        let mut out = Vec::new();
        cut.encode(&mut out);
        prop_assert_eq!(&out[..], bytes);
    }
    if let Ok(disk) = DiskInfo::decode(bytes) {
        let mut out = Vec::new();
        disk.encode(&mut out);
        prop_assert_eq!(&out[..], bytes);
    }
    if let Ok(mark) = SyncMark::decode(bytes) {
        let mut out = Vec::new();
        mark.encode(&mut out);
        prop_assert_eq!(&out[..], bytes);
    }
    if let Ok(raw) = RawRecord::ref_from_bytes(&bytes[..bytes.len().min(RECORD_LEN)])
        && let Ok(record) = Record::from_raw(raw)
    {
        prop_assert_eq!(&record.to_raw(), raw);
        prop_assert!(record.end() >= record.offset);
    }
    if let Ok(chunk) = Chunk::parse(bytes) {
        for record in chunk.records().flatten() {
            prop_assert!(record.payload_at as usize + record.payload_len as usize <= chunk.plain_len);
        }
    }
    if let Ok(header) = FrameHeader::parse(bytes) {
        prop_assert!(header.number.get() > header.acked.get() && header.first_seq <= header.last_seq);
    }
    if let Ok((header, directory)) = check_frame(bytes) {
        prop_assert_eq!(header.length.get() as usize, bytes.len());
        for entry in directory {
            prop_assert!(entry.at.get() as usize + entry.sealed_len.get() as usize <= bytes.len());
        }
    }
    if let Ok((head, length)) = SegmentHead::decode(bytes) {
        prop_assert_eq!(SegmentHead::decode(&head.encode()), Ok((head, length)));
    }
    if let Ok(key) = WrappedKey::read(&mut &bytes[..]) {
        let mut out = Vec::new();
        key.encode(&mut out);
        prop_assert_eq!(WrappedKey::read(&mut &out[..]), Ok(key));
    }
    if let Ok(Some((message, length))) = Handshake::read(bytes) {
        prop_assert!(length <= bytes.len());
        let again = message.encode();
        prop_assert_eq!(Handshake::read(&again), Ok(Some((message, again.len()))));
    }
    if let Ok(message) = Control::decode(bytes) {
        prop_assert_eq!(Control::decode(&message.encode()), Ok(message));
    }
    if let Ok(header) = IntentHeader::decode(bytes) {
        prop_assert_eq!(IntentHeader::decode(&header.encode()), Ok(header));
    }
    let _ = decode_page(0, bytes);
    if let Ok(list) = DamageFile::decode(bytes) {
        prop_assert_eq!(DamageFile::decode(&list.encode()), Ok(list));
    }
    if let Ok(state) = StreamStateFile::decode(bytes) {
        prop_assert_eq!(StreamStateFile::decode(&state.encode()), Ok(state));
    }
    if let Ok(table) = TimelineTable::decode(bytes) {
        prop_assert_eq!(TimelineTable::decode(&table.encode()), Ok(table));
    }
    if let Ok(file) = KeysFile::decode(bytes) {
        prop_assert_eq!(KeysFile::decode(&file.encode()), Ok(file));
    }
    Ok(())
}

/// One valid structure of any kind.
fn valid() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        cut().prop_map(|c| {
            let mut out = Vec::new();
            c.encode(&mut out);
            out
        }),
        disk().prop_map(|d| {
            let mut out = Vec::new();
            d.encode(&mut out);
            out
        }),
        record().prop_map(|r| r.to_raw().as_bytes().to_vec()),
        handshake().prop_map(|h| h.encode()),
        control().prop_map(|c| c.encode().to_vec()),
        segment().prop_map(|s| s.encode()),
        intent().prop_map(|i| i.encode().to_vec()),
        table().prop_map(|t| t.encode()),
        state().prop_map(|s| s.encode()),
        prop::collection::vec(record(), 1..5).prop_map(|records| {
            let mut out = vec![records.len() as u8, 0, 0, 0];
            out.extend(64_u32.to_le_bytes());
            out.extend(64_u32.to_le_bytes());
            out.extend([0; 4]);
            for record in records {
                out.extend(record.to_raw().as_bytes());
            }
            out.extend([7; 64]);
            out
        }),
        frame(),
    ]
}

/// A frame that passes every check that needs no key.
fn frame() -> impl Strategy<Value = Vec<u8>> {
    (id(), id(), 1..=MAX_NUMBER, 1..=MAX_NUMBER, 1..=64_usize, 1..=4_usize).prop_map(
        |(stream, incarnation, number, seq, chunks, pages)| {
            let mut out = vec![0; pages * ALIGN];
            out[..4].copy_from_slice(b"AIFR");
            out[4..6].copy_from_slice(&WIRE_VERSION.to_le_bytes());
            out[6..8].copy_from_slice(&(chunks as u16).to_le_bytes());
            let length = out.len() as u32;
            out[8..12].copy_from_slice(&length.to_le_bytes());
            out[16..32].copy_from_slice(&stream);
            out[32..48].copy_from_slice(&incarnation);
            out[48..56].copy_from_slice(&number.to_le_bytes());
            out[64..72].copy_from_slice(&seq.to_le_bytes());
            out[72..80].copy_from_slice(&seq.to_le_bytes());
            for i in 0..chunks {
                let at = 96 + i * 8;
                out[at..at + 4].copy_from_slice(&(640 + i as u32 * 32).to_le_bytes());
                out[at + 4..at + 8].copy_from_slice(&32_u32.to_le_bytes());
            }
            mend_crc(&mut out, 12, frame_crc);
            out
        },
    )
}

fn mend_crc(bytes: &mut [u8], at: usize, crc: impl Fn(&[u8]) -> u32) {
    let crc = crc(bytes);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

/// CRC32C with the four bytes at `at` taken as zero: what an attacker would write after changing the rest.
fn crc_with_hole(bytes: &[u8], at: usize) -> u32 {
    let mut copy = bytes.to_vec();
    copy[at..at + 4].fill(0);
    crc32c::crc32c(&copy)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn random_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        decode_all(&bytes)?;
    }

    #[test]
    fn random_bytes_behind_a_magic_are_survived(
        magic in prop::sample::select(vec![*b"AIFR", *b"AISG", *b"AITL", *b"AISS", *b"AIIL", *b"AIIP"]),
        mut bytes in prop::collection::vec(any::<u8>(), ALIGN),
        length in prop::sample::select(vec![0, 64, 4096, 8192, u32::MAX]),
    ) {
        bytes[..4].copy_from_slice(&magic);
        bytes[4..6].copy_from_slice(&WIRE_VERSION.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        decode_all(&bytes)?;
    }

    /// Mutated bytes with the checksum set right again: what a hostile peer can send.
    #[test]
    fn mutated_structures_are_survived(
        mut bytes in valid(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
        mend in any::<bool>(),
    ) {
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if mend && bytes.len() >= 64 {
            match &bytes[..4] {
                b"AIFR" | b"AISG" => mend_crc(&mut bytes, 12, |b| crc_with_hole(b, 12)),
                b"AITL" | b"AISS" | b"AIKS" | b"AIIL" | b"AIIP" => mend_crc(&mut bytes, 8, |b| crc_with_hole(b, 8)),
                _ => {}
            }
        }
        decode_all(&bytes)?;
    }

    /// Without a mended checksum, any change of a structure that has one is found.
    #[test]
    fn changes_under_a_checksum_are_found(
        bytes in prop_oneof![segment().prop_map(|s| s.encode()), table().prop_map(|t| t.encode()),
            state().prop_map(|s| s.encode()), keys().prop_map(|k| k.encode()), intent().prop_map(|i| i.encode().to_vec()), frame()],
        at in any::<prop::sample::Index>(),
        flip in 1..=255_u8,
    ) {
        let mut changed = bytes.clone();
        let at = at.index(bytes.len());
        changed[at] ^= flip;
        let error = match &bytes[..4] {
            b"AIFR" => check_frame(&changed).is_err(),
            b"AISG" => SegmentHead::decode(&changed).is_err(),
            b"AITL" => TimelineTable::decode(&changed).is_err(),
            b"AISS" => StreamStateFile::decode(&changed).is_err(),
            b"AIKS" => KeysFile::decode(&changed).is_err(),
            _ => IntentHeader::decode(&changed).is_err(),
        };
        prop_assert!(error, "byte {} of {} changed unseen", at, bytes.len());
    }

    /// Whoever counts on from a number that was read must not overflow.
    #[test]
    fn numbers_out_of_range_are_refused(number in MAX_NUMBER + 1..=u64::MAX) {
        let (mut cut, mut mark) = (Vec::new(), Vec::new());
        Cut { number, ..Cut::default() }.encode(&mut cut);
        SyncMark { sync: number, whole: true }.encode(&mut mark);
        let acks = [Control::Ack { frame: number, seq: 1 }, Control::Ack { frame: 1, seq: number }];
        let position = Position { seq: number, ..Position::default() };
        let welcome = Welcome::Accepted { timeline: TimelineId::NONE, position, whole_resync: false };
        let intent = IntentHeader { serial: number, ..IntentHeader::default() };
        let head = SegmentHead { segment: number, ..SegmentHead::default() };
        let table = TimelineTable { fold_floor: number, ..TimelineTable::default() };
        let state = StreamStateFile { floor: number, ..StreamStateFile::default() };
        prop_assert!(Cut::decode(&cut).is_err());
        prop_assert!(SyncMark::decode(&mark).is_err());
        prop_assert!(acks.iter().all(|ack| Control::decode(&ack.encode()).is_err()));
        prop_assert!(Handshake::read(&Handshake::Welcome(welcome).encode()).is_err());
        prop_assert!(IntentHeader::decode(&intent.encode()).is_err());
        prop_assert!(SegmentHead::decode(&head.encode()).is_err());
        prop_assert!(TimelineTable::decode(&table.encode()).is_err());
        let keys = KeysFile { retention_s: number, ..KeysFile::default() };
        prop_assert!(KeysFile::decode(&keys.encode()).is_err());
        prop_assert!(StreamStateFile::decode(&state.encode()).is_err());
    }

    #[test]
    fn control_messages_of_another_length_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        prop_assume!(bytes.len() != CONTROL_PLAIN_LEN);
        prop_assert!(Control::decode(&bytes).is_err());
    }
}
