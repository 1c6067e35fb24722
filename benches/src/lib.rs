//! What the benches share: data that compresses about as well as the files of a Linux system do.

use afterimage_dataplane::seal::{DataKey, FrameMeta, Item, Plan, Scratch, seal_frame};
use afterimage_wire::ids::{IncarnationId, StreamId};
use afterimage_wire::record::{Record, RecordKind};

/// How well the data of a bench shrinks.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// Runs of text between runs of noise: LZ4 makes it about 1.7 times smaller.
    Mixed,
    /// Does not shrink.
    Noise,
}

/// `len` bytes of it, the same for the same seed.
pub fn data(kind: Data, len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    };
    let mut out = Vec::with_capacity(len + 64);
    while out.len() < len {
        let word = next();
        if kind == Data::Noise || word & 1 == 0 {
            for _ in 0..4 {
                out.extend(next().to_le_bytes());
            }
        } else {
            out.extend(b"the after-image of a block, as written "[..32].iter().map(|b| b ^ (word >> 62) as u8));
        }
    }
    out.truncate(len);
    out
}

/// A frame's records: as many writes of `len` bytes as asked for.
pub fn writes(kind: Data, len: usize, count: usize) -> Vec<Vec<u8>> {
    (0..count).map(|i| data(kind, len, i as u64 + 1)).collect()
}

/// The items of these writes, one after the other on a disk.
pub fn items(payloads: &[Vec<u8>]) -> Vec<Item<'_>> {
    let mut offset = 0;
    payloads
        .iter()
        .enumerate()
        .map(|(i, payload)| {
            let record = Record {
                seq: i as u64 + 1,
                kind: RecordKind::Write,
                disk: 0,
                offset,
                len: payload.len() as u32,
                mono_ns: 0,
                wall_ns: 0,
                payload_at: 0,
                payload_len: 0,
                crc: 0,
            };
            offset += payload.len() as u64;
            Item { record, payload }
        })
        .collect()
}

/// What the header of the benches' frames says.
pub fn meta(number: u64) -> FrameMeta {
    FrameMeta {
        stream: StreamId([1; 16]),
        incarnation: IncarnationId([2; 16]),
        number,
        acked: number - 1,
        mono_ns: 0,
        sync_ms: 0,
    }
}

/// The plan of a frame of these items.
pub fn plan(items: &[Item<'_>]) -> Plan {
    let mut plan = Plan::default();
    for item in items {
        assert!(plan.add(item.payload.len()), "the bench's records fit a frame");
    }
    plan
}

/// A sealed frame of these writes.
pub fn frame(key: &DataKey, payloads: &[Vec<u8>], compress: bool) -> Vec<u8> {
    let items = items(payloads);
    let plan = plan(&items);
    let mut out = vec![0; plan.frame_bound()];
    let length = seal_frame(key, &meta(1), &plan, &items, compress, &mut Scratch::default(), &mut out);
    out.truncate(length);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixed_data_shrinks_and_noise_does_not() {
        let key = DataKey::new([7; 32]);
        let sealed = |kind| frame(&key, &writes(kind, 4096, 128), true).len() as f64;
        let plain = (4096 * 128) as f64;
        let ratio = plain / sealed(Data::Mixed);
        assert!((1.4..2.2).contains(&ratio), "{ratio}");
        assert!(plain / sealed(Data::Noise) < 1.0);
    }
}
