//! A sealed frame under a fixed key, pinned: `golden/frame-sealed.hex` was written once and is compared for ever. A
//! difference means that journals of an earlier build cannot be opened any more.
//!
//! The payloads are stored plain, so that a better compressor is no difference; an LZ4 frame of that day is only
//! *opened*: any correct decompressor gives the same bytes.

use std::fmt::Write as _;
use std::path::PathBuf;

use afterimage_dataplane::seal::{
    ControlKey, DataKey, FrameMeta, Item, Plan, PolicyKey, Scratch, open_chunk, payload, record_payload, seal_frame,
};
use afterimage_wire::chunk::{Chunk, Codec};
use afterimage_wire::control::{CONTROL_LEN, Control};
use afterimage_wire::frame::check_frame;
use afterimage_wire::ids::{IncarnationId, PolicyKeyId, StreamId};
use afterimage_wire::record::{Record, RecordKind};

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.hex"))
}

/// The pinned bytes; `new` is written if there are none yet and `AFTERIMAGE_NEW_GOLDEN` is set.
fn pinned(name: &str, new: &[u8]) -> Vec<u8> {
    let path = path(name);
    if !path.exists() && std::env::var_os("AFTERIMAGE_NEW_GOLDEN").is_some() {
        let mut text = String::new();
        for line in new.chunks(32) {
            for byte in line {
                write!(text, "{byte:02x}").expect("a string takes it");
            }
            text.push('\n');
        }
        std::fs::write(&path, text).expect("the golden folder can be written");
    }
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).expect("hex"), 16).expect("hex")).collect()
}

fn key() -> DataKey {
    DataKey::new(std::array::from_fn(|i| i as u8))
}

const INCARNATION: IncarnationId = IncarnationId([0x40; 16]);

fn meta() -> FrameMeta {
    FrameMeta {
        stream: StreamId([0x20; 16]),
        incarnation: INCARNATION,
        number: 7,
        acked: 5,
        mono_ns: 0x2122_2324_2526_2728,
        sync_ms: 0,
    }
}

fn record(seq: u64, kind: RecordKind, len: u32) -> Record {
    Record {
        seq,
        kind,
        disk: 1,
        offset: seq * 4096,
        len,
        mono_ns: 1_000 + seq,
        wall_ns: 2_000 + seq,
        payload_at: 0,
        payload_len: 0,
        crc: 0,
    }
}

/// What the pinned frames hold: three small records, then one in a chunk of its own.
fn contents() -> Vec<(Record, Vec<u8>)> {
    let text = |n: usize| (0..n).map(|i| (i / 7 % 251) as u8).collect::<Vec<u8>>();
    vec![
        (record(100, RecordKind::Write, 512), text(512)),
        (record(101, RecordKind::Zero, 4096), vec![]),
        (record(102, RecordKind::Write, 1024), text(1024)),
        (record(103, RecordKind::Write, 65_024), text(65_024)),
    ]
}

fn seal(compress: bool) -> Vec<u8> {
    let contents = contents();
    let items: Vec<_> = contents.iter().map(|(record, payload)| Item { record: *record, payload }).collect();
    let mut plan = Plan::default();
    for item in &items {
        assert!(plan.add(item.payload.len()));
    }
    let mut out = vec![0xee; plan.frame_bound()];
    let length = seal_frame(&key(), &meta(), &plan, &items, compress, &mut Scratch::default(), &mut out);
    out.truncate(length);
    out
}

fn assert_opens(mut frame: Vec<u8>, codec: Codec) {
    let (header, directory) = check_frame(&frame).expect("the pinned frame passes its check");
    let (header, directory) = (*header, directory.to_vec());
    assert_eq!((header.first_seq.get(), header.last_seq.get(), directory.len()), (100, 103, 2));
    let mut expected = contents().into_iter();
    for (index, entry) in directory.iter().enumerate() {
        let range = entry.at.get() as usize..(entry.at.get() + entry.sealed_len.get()) as usize;
        let opened = open_chunk(&key(), &header, index as u32, &mut frame[range]).expect("the pinned key opens it");
        let chunk = Chunk::parse(opened).expect("a chunk");
        assert_eq!(chunk.codec, codec);
        let mut room = Vec::new();
        let plain = payload(&chunk, &mut room).expect("decompresses");
        for found in chunk.records() {
            let found = found.expect("a record");
            let (record, data) = expected.next().expect("no more records than were sealed");
            assert_eq!(
                (found.seq, found.kind, found.offset, found.len),
                (record.seq, record.kind, record.offset, record.len)
            );
            assert_eq!(record_payload(&found, plain).expect("its checksum holds"), data);
        }
    }
    assert!(expected.next().is_none());
}

#[test]
fn plain_frame_is_the_pinned_one() {
    let frame = seal(false);
    assert!(pinned("frame-sealed", &frame) == frame, "the sealed bytes have changed");
    assert_opens(frame, Codec::Plain);
}

#[test]
fn pinned_compressed_frame_opens() {
    assert_opens(pinned("frame-sealed-lz4", &seal(true)), Codec::Lz4);
}

#[test]
fn wrapped_key_is_the_pinned_one() {
    let policy = PolicyKey::new(PolicyKeyId([0x90; 16]), [0x91; 32]);
    let wrapped = policy.wrap(INCARNATION, &key(), [0xa0; 12]);
    let mut bytes = Vec::new();
    wrapped.encode(&mut bytes);
    assert_eq!(pinned("wrapped-key", &bytes), bytes);
    // The key that comes back is the one that went in: it opens what the other sealed.
    let unwrapped = policy.unwrap(INCARNATION, &wrapped).expect("the same policy key");
    let mut frame = seal(false);
    let header = *check_frame(&frame).expect("a frame").0;
    let entry = check_frame(&frame).expect("a frame").1[0];
    let range = entry.at.get() as usize..(entry.at.get() + entry.sealed_len.get()) as usize;
    assert!(open_chunk(&unwrapped, &header, 0, &mut frame[range]).is_ok());
}

#[test]
fn sealed_control_messages_are_the_pinned_ones() {
    let mut sender = ControlKey::new(&[0x55; 32]);
    let mut bytes = Vec::new();
    for message in [Control::Ready, Control::Ack { frame: 7, seq: 103 }] {
        let mut out = [0; CONTROL_LEN];
        sender.seal(&message, &mut out);
        bytes.extend(out);
    }
    assert_eq!(pinned("control-sealed", &bytes), bytes);
}
