//! The pure stages of a write's path: sealing, checking, opening. Throughput is in bytes of the host's data.

use std::hint::black_box;

use afterimage_benches::{Data, frame, items, meta, plan, writes};
use afterimage_dataplane::index::{Cover, Entry, SegmentIndex};
use afterimage_dataplane::seal::{DataKey, Scratch, open_chunk, payload, record_payload, seal_frame};
use afterimage_wire::chunk::Chunk;
use afterimage_wire::frame::check_frame;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// Writes per frame and their length: a lone small write, a full frame of small ones, one large one.
const SHAPES: [(&str, usize, usize); 4] =
    [("1x4K", 1, 4096), ("16x4K", 16, 4096), ("128x4K", 128, 4096), ("1x512K", 1, 512 * 1024)];

fn key() -> DataKey {
    DataKey::new([7; 32])
}

fn seal(c: &mut Criterion) {
    let mut group = c.benchmark_group("seal");
    for (shape, count, len) in SHAPES {
        group.throughput(Throughput::Bytes((count * len) as u64));
        for (kind, name, compress) in
            [(Data::Mixed, "lz4", true), (Data::Noise, "lz4-noise", true), (Data::Mixed, "plain", false)]
        {
            let payloads = writes(kind, len, count);
            let items = items(&payloads);
            let plan = plan(&items);
            let (key, mut scratch, mut out) = (key(), Scratch::default(), vec![0; plan.frame_bound()]);
            let mut number = 0;
            group.bench_function(BenchmarkId::new(name, shape), |b| {
                b.iter(|| {
                    number += 1;
                    black_box(seal_frame(&key, &meta(number), &plan, &items, compress, &mut scratch, &mut out))
                });
            });
        }
    }
    group.finish();
}

fn check(c: &mut Criterion) {
    let mut group = c.benchmark_group("check");
    for (shape, count, len) in SHAPES {
        let frame = frame(&key(), &writes(Data::Mixed, len, count), false);
        group.throughput(Throughput::Bytes(frame.len() as u64));
        group.bench_function(BenchmarkId::new("frame", shape), |b| {
            b.iter(|| black_box(check_frame(&frame).expect("a valid frame")).1.len());
        });
    }
    group.finish();
}

fn open(c: &mut Criterion) {
    let mut group = c.benchmark_group("open");
    for (shape, count, len) in SHAPES {
        group.throughput(Throughput::Bytes((count * len) as u64));
        for (name, compress) in [("lz4", true), ("plain", false)] {
            let key = key();
            let frame = frame(&key, &writes(Data::Mixed, len, count), compress);
            let (header, directory) = check_frame(&frame).expect("a valid frame");
            let mut sealed = Vec::new();
            let mut room = Vec::new();
            group.bench_function(BenchmarkId::new(name, shape), |b| {
                b.iter(|| {
                    for (index, entry) in directory.iter().enumerate() {
                        // Opening is in place: each round needs the sealed bytes afresh.
                        sealed.clear();
                        sealed.extend_from_slice(&frame[entry.at.get() as usize..][..entry.sealed_len.get() as usize]);
                        let plain = open_chunk(&key, header, index as u32, &mut sealed).expect("its key");
                        let chunk = Chunk::parse(plain).expect("a chunk");
                        let plain = payload(&chunk, &mut room).expect("decompresses");
                        for record in chunk.records() {
                            let record = record.expect("a record");
                            black_box(record_payload(&record, plain).expect("its checksum holds"));
                        }
                    }
                });
            });
        }
    }
    group.finish();
}

/// A segment's index: records of 4 KiB at random places of a 1 GiB disk.
fn index(c: &mut Criterion) {
    const RECORDS: u32 = 20_000;
    let entries: Vec<Entry> = (0..RECORDS)
        .map(|n| {
            let mut entry = Entry::default();
            entry.start = u64::from(n.wrapping_mul(2_654_435_761) >> 14) * 4096;
            entry.seq_delta = n;
            entry.len = 4096;
            entry.frame = n / 16;
            entry.payload_at = n % 16 * 4096;
            entry
        })
        .collect();
    let mut group = c.benchmark_group("index");
    group.throughput(Throughput::Elements(RECORDS.into()));
    let filled = || {
        let mut index = SegmentIndex::new(1);
        for entry in &entries {
            index.add(*entry);
        }
        index.seal();
        index
    };
    group.bench_function("build 20000", |b| b.iter(|| black_box(filled()).len()));
    let (index, mut cover, mut place) = (filled(), Cover::default(), 0u64);
    group.throughput(Throughput::Elements(1));
    group.bench_function("look up 64K", |b| {
        b.iter(|| {
            place = (place + 40_503 * 4096) % (1 << 30);
            cover.start(place, place + 65536);
            cover.lay(&index, 1, 0, u64::MAX);
            black_box(cover.finish().len())
        });
    });
    group.finish();
}

criterion_group!(stages, seal, check, open, index);
criterion_main!(stages);
