//! Sealing and opening: what is sealed comes back, fits its bound, and nothing changed or foreign opens.

use afterimage_dataplane::seal::{
    ControlKey, DataKey, FrameMeta, Item, OpenError, Plan, PolicyKey, Scratch, open_chunk, payload, record_payload,
    seal_frame,
};
use afterimage_wire::chunk::{Chunk, Codec, MAX_PAYLOAD};
use afterimage_wire::control::{CONTROL_LEN, Control};
use afterimage_wire::frame::{MAX_FRAME, check_frame, frame_crc};
use afterimage_wire::ids::{IncarnationId, PolicyKeyId, StreamId};
use afterimage_wire::record::{Record, RecordKind};
use afterimage_wire::{ALIGN, FormatError};
use proptest::prelude::*;

/// What a payload is made of.
#[derive(Copy, Clone, Debug)]
enum Fill {
    Zeros,
    Text,
    Noise,
    Half,
}

fn fill(kind: Fill, len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut noise = move || {
        // xorshift64*: enough to be incompressible.
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8
    };
    (0..len)
        .map(|i| match kind {
            Fill::Zeros => 0,
            Fill::Text => b"the quick brown fox jumps over the lazy dog "[(i + seed as usize) % 44],
            Fill::Noise => noise(),
            Fill::Half => {
                if i / 512 % 2 == 0 {
                    0x20
                } else {
                    noise()
                }
            }
        })
        .collect()
}

fn length() -> impl Strategy<Value = usize> {
    prop_oneof![
        2 => Just(0_usize),
        2 => 1..4096_usize,
        4 => prop::sample::select(vec![512_usize, 4096, 8192, 16384]),
        2 => prop::sample::select(vec![65_535_usize, 65_536, 65_537, 131_072]),
        1 => 100_000..=524_288_usize,
        1 => Just(524_288_usize),
    ]
}

fn contents() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let kind = prop::sample::select(vec![Fill::Zeros, Fill::Text, Fill::Noise, Fill::Half]);
    prop::collection::vec((length(), kind, any::<u64>()), 1..40)
        .prop_map(|items| items.into_iter().map(|(len, kind, seed)| fill(kind, len, seed)).collect())
}

fn meta(number: u64) -> FrameMeta {
    FrameMeta {
        stream: StreamId([1; 16]),
        incarnation: IncarnationId([2; 16]),
        number,
        acked: number - 1,
        mono_ns: 77,
        sync_ms: 0,
    }
}

fn record(seq: u64, len: usize) -> Record {
    Record {
        seq,
        kind: if len == 0 { RecordKind::Zero } else { RecordKind::Write },
        disk: (seq % 3) as u16,
        offset: seq * 512,
        len: if len == 0 { 4096 } else { len as u32 },
        mono_ns: seq * 10,
        wall_ns: seq * 100,
        payload_at: 0,
        payload_len: 0,
        crc: 0,
    }
}

/// Seals as much of `contents` as fits one frame, into a buffer of exactly the planned bound; returns the frame and how
/// many records went in.
fn seal(
    key: &DataKey,
    meta: &FrameMeta,
    contents: &[Vec<u8>],
    compress: bool,
    scratch: &mut Scratch,
) -> (Vec<u8>, usize) {
    let mut plan = Plan::default();
    let fitting = contents.iter().take_while(|data| plan.add(data.len())).count();
    let items: Vec<_> = contents[..fitting]
        .iter()
        .enumerate()
        .map(|(i, payload)| Item { record: record(i as u64 + 1, payload.len()), payload })
        .collect();
    let mut out = vec![0xee; plan.frame_bound()];
    let length = seal_frame(key, meta, &plan, &items, compress, scratch, &mut out);
    assert!(length <= plan.frame_bound() && plan.frame_bound() <= MAX_FRAME);
    out.truncate(length);
    (out, fitting)
}

/// Records with their payloads, and how many chunks were compressed.
type Opened = (Vec<(Record, Vec<u8>)>, usize);

/// Opens a whole frame: the payload of each record, and how many chunks were compressed.
fn open(key: &DataKey, frame: &[u8]) -> Result<Opened, OpenError> {
    let (header, directory) = check_frame(frame)?;
    let mut out = Vec::new();
    let mut compressed = 0;
    for (index, entry) in directory.iter().enumerate() {
        let at = entry.at.get() as usize;
        let mut sealed = frame[at..at + entry.sealed_len.get() as usize].to_vec();
        let chunk = Chunk::parse(open_chunk(key, header, index as u32, &mut sealed)?)?;
        compressed += usize::from(chunk.codec == Codec::Lz4);
        let mut room = Vec::new();
        let plain = payload(&chunk, &mut room)?;
        for found in chunk.records() {
            let found = found?;
            out.push((found, record_payload(&found, plain)?.to_vec()));
        }
    }
    Ok((out, compressed))
}

/// Sets the frame's CRC right again, as somebody who tampers would.
fn mend_crc(frame: &mut [u8]) {
    let crc = frame_crc(frame);
    frame[12..16].copy_from_slice(&crc.to_le_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn what_is_sealed_comes_back(contents in contents(), compress in any::<bool>(), number in 1..=afterimage_wire::MAX_NUMBER) {
        let key = DataKey::new([9; 32]);
        let (frame, count) = seal(&key, &meta(number), &contents, compress, &mut Scratch::default());
        prop_assert!(frame.len() % ALIGN == 0);
        let (records, compressed) = open(&key, &frame).expect("the same key");
        prop_assert_eq!(records.len(), count);
        prop_assert!(compress || compressed == 0);
        for (i, (found, data)) in records.iter().enumerate() {
            let expected = record(i as u64 + 1, contents[i].len());
            prop_assert_eq!((found.seq, found.kind, found.disk, found.offset, found.len), (expected.seq, expected.kind, expected.disk, expected.offset, expected.len));
            prop_assert_eq!((found.mono_ns, found.wall_ns), (expected.mono_ns, expected.wall_ns));
            prop_assert!(*data == contents[i], "payload of record {} differs", i);
        }
        let header = check_frame(&frame).expect("checked above").0;
        prop_assert_eq!((header.first_seq.get(), header.last_seq.get()), (1, count as u64));
    }

    #[test]
    fn the_same_records_seal_to_the_same_bytes(contents in contents()) {
        let key = DataKey::new([9; 32]);
        let once = seal(&key, &meta(1), &contents, false, &mut Scratch::default());
        let twice = seal(&key, &meta(1), &contents, false, &mut Scratch::default());
        prop_assert!(once == twice);
    }

    #[test]
    fn any_changed_byte_is_found(contents in contents(), at in any::<prop::sample::Index>(), flip in 1..=255_u8) {
        let key = DataKey::new([9; 32]);
        let (frame, _) = seal(&key, &meta(3), &contents, true, &mut Scratch::default());
        let at = at.index(frame.len());
        let mut changed = frame.clone();
        changed[at] ^= flip;
        prop_assert!(check_frame(&changed).is_err(), "byte {} passes the check", at);
        // With its CRC mended only the seal is left to find it. What no seal covers: the padding, the length, the CRC.
        mend_crc(&mut changed);
        if let Ok((found, _)) = open(&key, &changed) {
            let (expected, _) = open(&key, &frame).expect("the same key");
            prop_assert!(found == expected, "byte {} changed what the frame says", at);
        }
    }

    #[test]
    fn another_key_incarnation_stream_or_number_does_not_open(contents in contents(), what in 0..6_u8) {
        let key = DataKey::new([9; 32]);
        let (mut frame, _) = seal(&key, &meta(10), &contents, true, &mut Scratch::default());
        let mut opener = key;
        match what {
            0 => opener = DataKey::new([10; 32]),
            1 => frame[16] ^= 1, // stream
            2 => frame[32] ^= 1, // incarnation
            3 => frame[48] ^= 4, // number
            4 => frame[56] ^= 1, // acked
            _ => frame[80] ^= 1, // mono_ns
        }
        mend_crc(&mut frame);
        prop_assert_eq!(open(&opener, &frame), Err(OpenError::Seal("a chunk")));
    }

    #[test]
    fn chunks_do_not_change_places(seeds in prop::collection::vec(any::<u64>(), 2..8)) {
        let contents: Vec<_> = seeds.into_iter().map(|s| fill(Fill::Noise, 60_000, s)).collect();
        let key = DataKey::new([9; 32]);
        let (mut frame, _) = seal(&key, &meta(3), &contents, false, &mut Scratch::default());
        let (first, second) = (96..104, 104..112);
        let entry: [u8; 8] = frame[first.clone()].try_into().expect("8 bytes");
        let range = |e: &[u8]| {
            let at = u32::from_le_bytes(e[..4].try_into().expect("4")) as usize;
            at..at + u32::from_le_bytes(e[4..8].try_into().expect("4")) as usize
        };
        let (a, b) = (range(&entry), range(&frame[second]));
        prop_assert_eq!(a.len(), b.len());
        let saved = frame[a.clone()].to_vec();
        frame.copy_within(b.clone(), a.start);
        frame[b].copy_from_slice(&saved);
        mend_crc(&mut frame);
        prop_assert!(open(&key, &frame).is_err());
    }

    #[test]
    fn a_plan_never_exceeds_a_frame(lengths in prop::collection::vec(prop_oneof![Just(0_usize), 0..=MAX_PAYLOAD, 500..5000_usize], 1..3000)) {
        let mut plan = Plan::default();
        let mut added = 0;
        for len in &lengths {
            if !plan.add(*len) {
                break;
            }
            added += 1;
            prop_assert!(plan.frame_bound() <= MAX_FRAME);
        }
        prop_assert!(added >= 1, "a frame takes any one record");
        prop_assert_eq!(plan.records(), added);
        let bound = plan.frame_bound();
        if added < lengths.len() {
            prop_assert!(!plan.add(lengths[added]), "refused once, refused again");
            prop_assert_eq!((plan.records(), plan.frame_bound()), (added, bound));
        }
        plan.clear();
        prop_assert!(plan.is_empty() && plan.add(MAX_PAYLOAD));
    }

    #[test]
    fn a_data_key_comes_back_only_under_its_policy_key(bytes in any::<[u8; 32]>(), nonce in any::<[u8; 12]>(), flip in 0..48_usize) {
        let (policy, other) = (PolicyKey::new(PolicyKeyId([1; 16]), [2; 32]), PolicyKey::new(PolicyKeyId([1; 16]), [3; 32]));
        let incarnation = IncarnationId([4; 16]);
        let wrapped = policy.wrap(incarnation, &DataKey::new(bytes), nonce);
        let key = policy.unwrap(incarnation, &wrapped).expect("the same key");
        let (frame, _) = seal(&DataKey::new(bytes), &meta(1), &[vec![7; 512]], false, &mut Scratch::default());
        prop_assert!(open(&key, &frame).is_ok());
        prop_assert!(other.unwrap(incarnation, &wrapped).is_err());
        prop_assert!(policy.unwrap(IncarnationId([5; 16]), &wrapped).is_err());
        prop_assert!(PolicyKey::new(PolicyKeyId([9; 16]), [2; 32]).unwrap(incarnation, &wrapped).is_err());
        let mut changed = wrapped;
        changed.sealed.0[flip] ^= 1;
        prop_assert!(policy.unwrap(incarnation, &changed).is_err());
    }

    #[test]
    fn control_messages_are_neither_dropped_doubled_nor_changed(count in 2..20_u64, skip in any::<prop::sample::Index>(), flip in 0..CONTROL_LEN) {
        let sealed: Vec<_> = {
            let mut sender = ControlKey::new(&[3; 32]);
            (0..count).map(|frame| {
                let mut out = [0; CONTROL_LEN];
                sender.seal(&Control::Ack { frame, seq: frame * 2 }, &mut out);
                out
            }).collect()
        };
        let mut receiver = ControlKey::new(&[3; 32]);
        let skip = skip.index(sealed.len() - 1);
        for (frame, bytes) in sealed.iter().enumerate().take(skip) {
            prop_assert_eq!(receiver.open(bytes), Ok(Control::Ack { frame: frame as u64, seq: frame as u64 * 2 }));
            prop_assert!(receiver.open(bytes).is_err(), "the same message twice");
        }
        prop_assert!(receiver.open(&sealed[skip + 1]).is_err(), "a message is missing");
        let mut changed = sealed[skip];
        changed[flip] ^= 1;
        prop_assert!(receiver.open(&changed).is_err());
        prop_assert!(ControlKey::new(&[4; 32]).open(&sealed[0]).is_err());
        // A refused message takes nothing from the next one.
        prop_assert!(receiver.open(&sealed[skip]).is_ok());
    }

    #[test]
    fn a_payload_that_lies_about_its_length_is_refused(stored in prop::collection::vec(any::<u8>(), 0..300), plain_len in 0..100_000_usize) {
        let chunk = Chunk { codec: Codec::Lz4, plain_len, table: &[], stored: &stored };
        let mut room = Vec::new();
        match payload(&chunk, &mut room) {
            Ok(plain) => prop_assert_eq!(plain.len(), plain_len),
            Err(error) => prop_assert_eq!(error, OpenError::Compression),
        }
    }
}

/// LZ4 refuses to begin without room for its worst case: the planned bound must hold it for every size, or data that
/// would shrink is sent as it is.
#[test]
fn every_size_that_shrinks_is_compressed() {
    let key = DataKey::new([9; 32]);
    for len in [512, 4096, 16_384, 65_536, 65_537, 262_144, 524_288, MAX_PAYLOAD] {
        let (frame, _) = seal(&key, &meta(1), &[fill(Fill::Text, len, 0)], true, &mut Scratch::default());
        assert!(frame.len() <= ALIGN + len / 20, "{len} bytes of text became a frame of {}", frame.len());
    }
    // The last chunk of a full frame, too.
    let full: Vec<_> = (0..400).map(|i| fill(Fill::Text, 4096, i)).collect();
    let (frame, count) = seal(&key, &meta(1), &full, true, &mut Scratch::default());
    let (_, compressed) = open(&key, &frame).expect("the same key");
    assert_eq!(compressed, count.div_ceil(16), "of {count} writes of 4096 bytes");
}

#[test]
fn data_that_does_not_shrink_is_stored_as_it_is() {
    let key = DataKey::new([9; 32]);
    let mut scratch = Scratch::default();
    for seed in 1..20 {
        let (frame, _) = seal(&key, &meta(seed), &[fill(Fill::Noise, 65_536, seed)], true, &mut scratch);
        assert_eq!(open(&key, &frame).expect("the same key").1, 0);
    }
    // … and what follows is compressed again before long.
    let shrunk = (20..90)
        .map(|n| seal(&key, &meta(n), &[fill(Fill::Text, 65_536, n)], true, &mut scratch))
        .position(|(frame, _)| open(&key, &frame).expect("the same key").1 == 1);
    assert!(shrunk.is_some_and(|after| after <= 64), "{shrunk:?}");
}

#[test]
fn a_frame_cut_short_is_named_so() {
    let key = DataKey::new([9; 32]);
    let (frame, _) = seal(&key, &meta(1), &[vec![1; 100_000]], false, &mut Scratch::default());
    let error = check_frame(&frame[..frame.len() - ALIGN]).expect_err("a page is missing");
    assert!(matches!(error, FormatError::Short { what: "frame", .. }), "{error}");
}
