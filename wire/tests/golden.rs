//! The bytes of every structure of the wire, pinned: `golden/*.hex` were written once and are compared for ever.
//!
//! A difference here means that files and peers of an earlier build can no longer be read. Do not mend the hex: raise
//! [`WIRE_VERSION`] and keep reading the old bytes. Only a *new* structure gets a new file, with
//! `AFTERIMAGE_NEW_GOLDEN=1 cargo test -p afterimage-wire --test golden`, which never replaces one.

use std::fmt::Write as _;
use std::path::PathBuf;

use afterimage_wire::chunk::{Chunk, ChunkHead, Codec};
use afterimage_wire::control::{Control, StopReason};
use afterimage_wire::damage::{DamageFile, LostFrame, LostStretch};
use afterimage_wire::frame::{DirectoryEntry, FRAME_MAGIC, FrameHeader, check_frame, frame_crc};
use afterimage_wire::handshake::{DiskClaim, Handshake, Hello, Position, Refusal, Welcome};
use afterimage_wire::ids::{DiskId, IncarnationId, PolicyKeyId, StreamId, TimelineId};
use afterimage_wire::intent::{IntentHeader, Witness, decode_page, encode_page, page_serial};
use afterimage_wire::keys::{HeldKey, KeysFile, SEALED_KEY_LEN};
use afterimage_wire::record::{Cut, DiskInfo, RawRecord, Record, RecordKind, SyncMark};
use afterimage_wire::segment::{Predecessor, Sealed48, SegmentHead, WrappedKey};
use afterimage_wire::stream_state::{DeltaView, DiskLife, OpenSync, StreamStateFile, UnreadableRange};
use afterimage_wire::timeline::{DiskGeneration, Fence, Timeline, TimelineKind, TimelineTable};
use afterimage_wire::{ALIGN, WIRE_VERSION};
use zerocopy::{FromBytes, IntoBytes};

/// Compares `bytes` with the file of that name: 32 bytes a line, a run of equal all-zero lines as `zeros N`.
fn golden(name: &str, bytes: &[u8]) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.hex"));
    let text = to_hex(bytes);
    if !path.exists() && std::env::var_os("AFTERIMAGE_NEW_GOLDEN").is_some() {
        std::fs::write(&path, &text).expect("the golden folder can be written");
    }
    let pinned = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(text, pinned, "{name}: the bytes on the wire have changed");
}

fn to_hex(bytes: &[u8]) -> String {
    let mut out = String::new();
    let mut zeros = 0;
    for line in bytes.chunks(32) {
        if line.len() == 32 && line.iter().all(|b| *b == 0) {
            zeros += 32;
            continue;
        }
        if zeros > 0 {
            writeln!(out, "zeros {zeros}").expect("a string takes it");
            zeros = 0;
        }
        for byte in line {
            write!(out, "{byte:02x}").expect("a string takes it");
        }
        out.push('\n');
    }
    if zeros > 0 {
        writeln!(out, "zeros {zeros}").expect("a string takes it");
    }
    out
}

/// The bytes that a file of the golden folder pins.
fn from_hex(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.hex"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut out = Vec::new();
    for line in text.lines() {
        match line.strip_prefix("zeros ") {
            Some(count) => out.resize(out.len() + count.parse::<usize>().expect("a number"), 0),
            None => {
                out.extend((0..line.len()).step_by(2).map(|at| u8::from_str_radix(&line[at..at + 2], 16).expect("hex")))
            }
        }
    }
    out
}

/// 16 bytes counting up from `first`.
fn id(first: u8) -> [u8; 16] {
    std::array::from_fn(|i| first.wrapping_add(i as u8))
}

fn disk(slot: u16) -> DiskInfo {
    DiskInfo {
        slot,
        id: DiskId(id(0x10 + slot as u8)),
        size: 1 << 30,
        block: 512,
        physical_block: 4096,
        serial: format!("serial-{slot}"),
        name: format!("disk \u{e9} {slot}"),
    }
}

fn wrapped() -> WrappedKey {
    WrappedKey {
        policy_key: PolicyKeyId(id(0x90)),
        nonce: std::array::from_fn(|i| 0xa0 + i as u8),
        sealed: Sealed48(std::array::from_fn(|i| 0xc0 ^ i as u8)),
    }
}

fn predecessor() -> Predecessor {
    Predecessor { incarnation: IncarnationId(id(0x70)), frame: 0x0102_0304_0506_0708, seq: 0x1112_1314_1516_1718 }
}

fn record(kind: RecordKind) -> Record {
    use RecordKind::*;
    let len = match kind {
        Cut | Join | Leave | SyncBegin | SyncEnd | End | Resize => 0,
        _ => 0x2000,
    };
    let payload_len = match kind {
        Write | SyncWrite => 0x2000,
        Cut | Join | SyncBegin | SyncEnd | SyncHash | End | Resize => 0x20,
        Zero | Discard | SyncZero | Leave | Unreadable => 0,
    };
    Record {
        seq: 0x0102_0304_0506_0708,
        kind,
        disk: 0x1718,
        offset: 0x2122_2324_2526_2000,
        len,
        mono_ns: 0x3132_3334_3536_3738,
        wall_ns: 0x4142_4344_4546_4748,
        payload_at: 0x5152,
        payload_len,
        crc: 0x6162_6364,
    }
}

#[test]
fn record_entries() {
    use RecordKind::*;
    let kinds = [
        Write, Zero, Discard, Cut, Join, Leave, Unreadable, SyncBegin, SyncWrite, SyncZero, SyncHash, SyncEnd, End,
        Resize,
    ];
    for (number, kind) in kinds.into_iter().enumerate() {
        assert_eq!(kind as usize, number + 1);
        let raw = record(kind).to_raw();
        golden(&format!("record-{:02}-{}", kind as u8, format!("{kind:?}").to_lowercase()), raw.as_bytes());
        assert_eq!(Record::from_raw(&raw), Ok(record(kind)));
    }
    assert!(RecordKind::from_u8(0).is_err() && RecordKind::from_u8(15).is_err());
}

#[test]
fn cut() {
    for (name, cut) in [
        ("cut-plain", Cut { number: 0x0102_0304_0506_0708, ..Cut::default() }),
        ("cut-label", Cut { number: 9, clock_synced: true, flush_clean: true, label: "before \u{fc}pgrade".into() }),
    ] {
        let mut bytes = Vec::new();
        cut.encode(&mut bytes);
        golden(name, &bytes);
        assert_eq!(Cut::decode(&bytes), Ok(cut));
    }
}

#[test]
fn disk_info() {
    let mut bytes = Vec::new();
    disk(3).encode(&mut bytes);
    golden("disk-info", &bytes);
    assert_eq!(DiskInfo::decode(&bytes), Ok(disk(3)));
}

#[test]
fn sync_mark() {
    let mark = SyncMark { sync: 0x0102_0304_0506_0708, whole: true };
    let mut bytes = Vec::new();
    mark.encode(&mut bytes);
    golden("sync-mark", &bytes);
    assert_eq!(SyncMark::decode(&bytes), Ok(mark));
}

fn chunk_bytes() -> Vec<u8> {
    let payload = b"thirty-two bytes of a cut's body";
    let table: [RawRecord; 2] = [record(RecordKind::Leave), record(RecordKind::Cut)].map(|r| {
        let mut r = r;
        r.payload_at = 0;
        r.to_raw()
    });
    let head = ChunkHead {
        record_count: 2.into(),
        codec: Codec::Plain as u8,
        reserved: 0,
        plain_len: (payload.len() as u32).into(),
        stored_len: (payload.len() as u32).into(),
        reserved2: 0.into(),
    };
    [head.as_bytes(), table.as_bytes(), payload].concat()
}

#[test]
fn chunk() {
    let bytes = chunk_bytes();
    golden("chunk", &bytes);
    let chunk = Chunk::parse(&bytes).expect("a valid chunk");
    assert_eq!((chunk.codec, chunk.plain_len, chunk.stored.len()), (Codec::Plain, 32, 32));
    let kinds: Vec<_> = chunk.records().map(|r| r.expect("a valid record").kind).collect();
    assert_eq!(kinds, [RecordKind::Leave, RecordKind::Cut]);
}

fn frame_header() -> FrameHeader {
    FrameHeader {
        magic: FRAME_MAGIC,
        version: WIRE_VERSION.into(),
        chunk_count: 2.into(),
        length: (ALIGN as u32).into(),
        crc: 0.into(),
        stream: StreamId(id(0x20)),
        incarnation: IncarnationId(id(0x40)),
        number: 0x0102_0304_0506_0708.into(),
        acked: 0x0102_0304_0506_0701.into(),
        first_seq: 0x1112_1314_1516_1718.into(),
        last_seq: 0x1112_1314_1516_1719.into(),
        mono_ns: 0x2122_2324_2526_2728.into(),
        sync_ms: 0x9192_9394.into(),
        reserved: [0; 4],
    }
}

#[test]
fn frame_header_directory_and_crc() {
    let mut bytes = vec![0; ALIGN];
    bytes[..96].copy_from_slice(frame_header().as_bytes());
    for (i, (at, sealed_len)) in [(112_u32, 100_u32), (224, 48)].into_iter().enumerate() {
        let entry = DirectoryEntry { at: at.into(), sealed_len: sealed_len.into() };
        bytes[96 + i * 8..104 + i * 8].copy_from_slice(entry.as_bytes());
        bytes[at as usize..][..sealed_len as usize].fill(0xd0 + i as u8);
    }
    let crc = frame_crc(&bytes);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    golden("frame-unsealed", &bytes);
    let (header, directory) = check_frame(&bytes).expect("a valid frame");
    assert_eq!((header.number.get(), directory.len()), (0x0102_0304_0506_0708, 2));
    assert_eq!(FrameHeader::ref_from_bytes(&bytes[..96]).expect("96 bytes"), header);
}

#[test]
fn associated_data_and_nonce() {
    let header = frame_header();
    golden("associated-data", &header.associated_data(0x0a0b_0c0d));
    golden("nonce", &header.nonce(0x0a0b_0c0d));
}

#[test]
fn wrapped_key() {
    let mut bytes = Vec::new();
    wrapped().encode(&mut bytes);
    golden("wrapped-key", &bytes);
    assert_eq!(WrappedKey::read(&mut &bytes[..]), Ok(wrapped()));
}

#[test]
fn segment_head() {
    let head = SegmentHead {
        stream: StreamId(id(0x20)),
        timeline: TimelineId(id(0x30)),
        incarnation: IncarnationId(id(0x40)),
        predecessor: predecessor(),
        segment: 0x0102_0304_0506_0708,
        first_frame: 0x1112_1314_1516_1718,
        first_seq: 0x2122_2324_2526_2728,
        created_wall_ns: 0x3132_3334_3536_3738,
        key: wrapped(),
        disks: vec![disk(0), disk(7)],
    };
    let bytes = head.encode();
    assert_eq!(bytes.len(), ALIGN);
    golden("segment-head", &bytes);
    assert_eq!(SegmentHead::decode(&bytes), Ok((head, ALIGN)));
}

#[test]
fn handshake() {
    let hello = Hello {
        version: WIRE_VERSION,
        stream: StreamId(id(0x20)),
        incarnation: IncarnationId(id(0x40)),
        predecessor: predecessor(),
        key: wrapped(),
        first_seq: 0x2122_2324_2526_2728,
        next_frame: 0x3132_3334_3536_3738,
        connection: 0,
        disks: vec![
            DiskClaim { disk: disk(0), generation: 1 },
            DiskClaim { disk: disk(7), generation: 0x4142_4344_4546_4748 },
        ],
    };
    let accepted = Welcome::Accepted {
        timeline: TimelineId(id(0x30)),
        position: Position {
            incarnation: IncarnationId(id(0x40)),
            frame: 0x0102_0304_0506_0708,
            seq: 0x1112_1314_1516_1718,
        },
        whole_resync: true,
    };
    let refused = |reason| Handshake::Welcome(Welcome::Refused { reason, message: "because".into() });
    for (name, message) in [
        ("hello", Handshake::Hello(hello)),
        ("welcome-accepted", Handshake::Welcome(accepted)),
        ("welcome-refused-1-unknown-stream", refused(Refusal::UnknownStream)),
        ("welcome-refused-2-version", refused(Refusal::Version { known: 0x0102 })),
        (
            "welcome-refused-3-fenced",
            refused(Refusal::Fenced { disk: DiskId(id(0x10)), generation: 0x4142_4344_4546_4748 }),
        ),
        ("welcome-refused-4-branch", refused(Refusal::Branch)),
        ("welcome-refused-5-seq-behind", refused(Refusal::SeqBehind { newest: 0x1112_1314_1516_1718 })),
        ("welcome-refused-6-busy", refused(Refusal::Busy)),
        ("welcome-refused-7-unable", refused(Refusal::Unable)),
        ("welcome-refused-8-bad-claim", refused(Refusal::BadClaim)),
        ("begin", Handshake::Begin),
    ] {
        let bytes = message.encode();
        golden(&format!("handshake-{name}"), &bytes);
        assert_eq!(Handshake::read(&bytes), Ok(Some((message, bytes.len()))));
    }
}

#[test]
fn control_messages() {
    let stop = |reason| Control::Stop { reason, value: 0x0102_0304_0506_0708 };
    for (name, message) in [
        ("ready", Control::Ready),
        ("ack", Control::Ack { frame: 0x0102_0304_0506_0708, seq: 0x1112_1314_1516_1718 }),
        ("alive", Control::Alive),
        ("stop-1-fenced", stop(StopReason::Fenced)),
        ("stop-2-bad-frame", stop(StopReason::BadFrame)),
        ("stop-3-no-space", stop(StopReason::NoSpace)),
        ("stop-4-journal-failed", stop(StopReason::JournalFailed)),
        ("stop-5-replaced", stop(StopReason::Replaced)),
        ("stop-6-shutting-down", stop(StopReason::ShuttingDown)),
        ("compared", Control::Compared { seq: 0x1112_1314_1516_1718, differs: 0x2122_2324_2526_2728 }),
        ("want", Control::Want { disk: 0x1718, offset: 0x0102_0304_0506_0708, len: 0x2122_2324_2526_2728 }),
    ] {
        let bytes = message.encode();
        golden(&format!("control-{name}"), &bytes);
        assert_eq!(Control::decode(&bytes), Ok(message));
    }
    for (offset, len) in [(0, 0), (u64::MAX, 1)] {
        assert!(Control::decode(&Control::Want { disk: 1, offset, len }.encode()).is_err());
    }
}

#[test]
fn hashes_are_one_for_each_step_of_their_range() {
    let raw = |len, payload_len| Record { len, payload_len, ..record(RecordKind::SyncHash) }.to_raw();
    for (len, payload_len) in [(1, 16), (4096, 16), (4097, 32), (262_144, 1024)] {
        assert!(Record::from_raw(&raw(len, payload_len)).is_ok());
    }
    for (len, payload_len) in [(0, 0), (4096, 0), (4096, 32), (4097, 16), (266_240, 1040)] {
        assert!(Record::from_raw(&raw(len, payload_len)).is_err());
    }
}

#[test]
fn intent_header() {
    let header = IntentHeader {
        serial: 0x0102_0304_0506_0708,
        disk: DiskId(id(0x10)),
        size: 1 << 30,
        stream: StreamId(id(0x20)),
        incarnation: IncarnationId(id(0x40)),
        boot: id(0x50),
        acked_frame: 0x1112_1314_1516_1718,
        acked_seq: 0x2122_2324_2526_2728,
        reserved_seq: 0x3132_3334_3536_3738,
        cut: 0x4142_4344_4546_4748,
        sync: 0x5152_5354_5556_5758,
        generation: 0x6162_6364_6566_6768,
        whole_owed: true,
        clean: true,
        sync_owed: true,
        mapped: true,
        mtime_ns: 0x7172_7374_7576_7778,
        prior: Predecessor {
            incarnation: IncarnationId(id(0x60)),
            frame: 0x0182_8384_8586_8788,
            seq: 0x1192_9394_9596_9798,
        },
        spilled: Predecessor {
            incarnation: IncarnationId(id(0x70)),
            frame: 0x21a2_a3a4_a5a6_a7a8,
            seq: 0x31b2_b3b4_b5b6_b7b8,
        },
        complete_wall_ns: 0x41c2_c3c4_c5c6_c7c8,
        identity: 0xa1a2_a3a4_a5a6_a7a8,
        fenced: true,
        left: true,
        lease_at: 0x21a2_a3a4_a5a6_a7a8,
        log_identity: 0xb1b2_b3b4_b5b6_b7b8,
        promised_ms: 0xc1c2_c3c4,
    };
    let bytes = header.encode();
    golden("intent-header-3", &bytes);
    assert_eq!(IntentHeader::decode(&bytes), Ok(header));
    // As the versions before wrote it.
    let old = from_hex("intent-header-2");
    assert_eq!(IntentHeader::decode(&old), Ok(IntentHeader { promised_ms: 0, ..header }));
    let oldest = from_hex("intent-header");
    assert_eq!(IntentHeader::decode(&oldest), Ok(IntentHeader { log_identity: 0, promised_ms: 0, ..header }));
}

#[test]
fn witness() {
    let witness = Witness { disk: DiskId(id(0x10)), stream: StreamId(id(0x20)), serial: 0x0102_0304_0506_0708 };
    let bytes = witness.encode();
    golden("intent-witness", &bytes);
    assert_eq!(Witness::decode(&bytes), Ok(witness));
}

#[test]
fn intent_page() {
    let mut bits = vec![0; ALIGN - 16];
    bits[..8].copy_from_slice(&[1, 2, 4, 8, 16, 32, 64, 128]);
    bits[4079] = 0x80;
    let mut page = vec![0; ALIGN];
    encode_page(0x0102_0304, 0x3132_3334_4142_4344, &bits, &mut page);
    golden("intent-page-2", &page);
    assert_eq!(decode_page(0x0102_0304, &page), Ok(&bits[..]));
    for header in [0x3132_3334_4142_4344, 0x3132_3334_4142_0000, 0x3132_3334_7142_4344] {
        assert_eq!(page_serial(&page, header), Some(0x3132_3334_4142_4344));
    }
    // As version 1 wrote it.
    let old = from_hex("intent-page");
    assert_eq!(decode_page(0x0102_0304, &old), Ok(&bits[..]));
    assert_eq!(page_serial(&old, 7), None);
}

#[test]
fn timeline_table() {
    let timeline = |first: u8, kind, reason: &str| Timeline {
        id: TimelineId(id(first)),
        parent: if first == 0x30 { TimelineId::NONE } else { TimelineId(id(0x30)) },
        fork_seq: 0x0102_0304_0506_0700 + u64::from(first),
        kind,
        created_wall_ns: 0x1112_1314_1516_1718,
        reason: reason.into(),
    };
    let table = TimelineTable {
        stream: StreamId(id(0x20)),
        current: TimelineId(id(0x30)),
        fold_floor: 0x2122_2324_2526_2728,
        timelines: vec![
            timeline(0x30, TimelineKind::Source, ""),
            timeline(0x31, TimelineKind::Failover, "failover to cut 7"),
            timeline(0x32, TimelineKind::View, "look"),
            timeline(0x33, TimelineKind::Losing, "fenced"),
        ],
        disks: vec![
            DiskGeneration { disk: disk(0), generation: 2, timeline: TimelineId(id(0x31)), member: true },
            DiskGeneration { disk: disk(7), generation: 1, timeline: TimelineId(id(0x30)), member: false },
        ],
        fences: vec![Fence {
            generation: 2,
            seq: 0x3132_3334_3536_3738,
            incarnation: IncarnationId(id(0x40)),
            wall_ns: 0x4142_4344_4546_4748,
            zero_loss: true,
            disks: vec![DiskId(id(0x10)), DiskId(id(0x17))],
            reason: "failover".into(),
        }],
    };
    let bytes = table.encode();
    golden("timeline-table", &bytes);
    assert_eq!(TimelineTable::decode(&bytes), Ok(table));
}

#[test]
fn keys_file() {
    let sealed = |first: u8| std::array::from_fn::<u8, SEALED_KEY_LEN, _>(|at| first + at as u8);
    let file = KeysFile {
        stream: StreamId(id(0x20)),
        site_key: id(0x50),
        recovery_key: id(0x60),
        retention_s: 0x0102_0304_0506_0708,
        name: "shöp".into(),
        keys: vec![
            HeldKey { id: PolicyKeyId(id(0x70)), site: sealed(0x80), recovery: Some(sealed(0xc0)) },
            HeldKey { id: PolicyKeyId(id(0x71)), site: sealed(0x81), recovery: None },
        ],
        disks: vec![(disk(0), 2), (disk(7), 0x1112_1314_1516_1718)],
    };
    let bytes = file.encode();
    golden("keys-file", &bytes);
    assert_eq!(KeysFile::decode(&bytes), Ok(file));
}

#[test]
fn every_golden_file_belongs_to_a_structure() {
    // A file that no test reads pins nothing: the count says that one was renamed or forgotten.
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let files = std::fs::read_dir(folder).expect("the golden folder is there").count();
    assert_eq!(files, 57);
}

#[test]
fn stream_state() {
    let open =
        vec![OpenSync { sync: 0x0102, whole: true, tainted: false }, OpenSync { sync: 7, whole: false, tainted: true }];
    let view = |first: u8, kind, removing| DeltaView {
        timeline: TimelineId(id(first)),
        seq: 0x2122_2324_2526_2728,
        kind,
        removing,
        name: format!("view {first}"),
        disks: vec![DiskId(id(0x10)), DiskId(id(0x17))],
    };
    let state = StreamStateFile {
        stream: StreamId(id(0x20)),
        floor: 0x0102_0304_0506_0708,
        newest_cut: 0x1112_1314_1516_1718,
        disks: vec![
            DiskLife { info: disk(0), member: true, owes_whole: false, open },
            DiskLife { info: disk(7), member: false, owes_whole: true, open: Vec::new() },
        ],
        incarnations: vec![IncarnationId(id(0x40)), IncarnationId(id(0x41))],
        views: vec![view(0x31, TimelineKind::Failover, false), view(0x32, TimelineKind::View, true)],
        unreadable: vec![UnreadableRange { slot: 7, offset: 0x3132_3334_3536_3000, len: 0x1000 }],
    };
    golden("stream-state", &state.encode());
    assert_eq!(StreamStateFile::decode(&state.encode()), Ok(state));
}

#[test]
fn damage_list() {
    let header = FrameHeader {
        magic: FRAME_MAGIC,
        version: WIRE_VERSION.into(),
        chunk_count: 2.into(),
        length: 8192.into(),
        crc: 0.into(),
        stream: StreamId(id(0x20)),
        incarnation: IncarnationId(id(0x40)),
        number: 9.into(),
        acked: 8.into(),
        first_seq: 100.into(),
        last_seq: 102.into(),
        mono_ns: 0x3132_3334_3536_3738.into(),
        sync_ms: 0.into(),
        reserved: [0; 4],
    };
    let record = |seq, kind, len, payload_len| Record {
        seq,
        kind,
        disk: 7,
        offset: 0x1112_1314_1516_1718,
        len,
        mono_ns: 1,
        wall_ns: 2,
        payload_at: 0,
        payload_len,
        crc: 0,
    };
    let cut = vec![7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0];
    let frame = LostFrame {
        timeline: TimelineId(id(0x30)),
        segment: 0x0102_0304_0506_0708,
        at: 0x2122_2000,
        header,
        wall_ns: 0x4142_4344_4546_4748,
        lost: 2,
        directory: vec![(112, 1000), (1120, 2000)],
        records: vec![
            (record(101, RecordKind::Write, 512, 512), Vec::new()),
            (record(102, RecordKind::Cut, 0, 11), cut),
        ],
    };
    let file = DamageFile { stream: StreamId(id(0x20)), frames: vec![frame], stretches: Vec::new() };
    let bytes = file.encode();
    golden("damage-list", &bytes);
    assert_eq!(DamageFile::decode(&bytes), Ok(file.clone()));
    let stretch = LostStretch {
        timeline: TimelineId(id(0x30)),
        incarnation: IncarnationId(id(0x40)),
        segment: 0x0102_0304_0506_0708,
        first_frame: 0x5152_5354_5556_5758,
        last_frame: 0x6162_6364_6566_6768,
        first_seq: 0x0172_7374_7576_7778,
        found_at: 0x0182_8384_8586_8788,
    };
    let file = DamageFile { stretches: vec![stretch], ..file };
    let bytes = file.encode();
    golden("damage-list-2", &bytes);
    assert_eq!(DamageFile::decode(&bytes), Ok(file));
}
