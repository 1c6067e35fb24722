//! An older copy of a write-intent log, put in its place, is found out; and nothing else is taken for one.

#[path = "source/bed.rs"]
#[allow(dead_code)]
mod bed;

use afterimage_dataplane::io::sim::Rng;
use afterimage_dataplane::io::{Io, Op, OpenHow, Part};
use afterimage_dataplane::source::{SourceEvent, SourceLimits};
use afterimage_wire::ALIGN;
use afterimage_wire::intent::{EXTENT, INTENT_VERSION, IntentHeader, Witness};
use afterimage_wire::record::RecordKind;
use bed::{Bed, MS, SIZE};

fn bed(seed: u64) -> Bed {
    let limits = SourceLimits { queue_bytes: 8 << 20, hot_extents: 0, ..SourceLimits::default() };
    let mut bed = Bed::new(seed, 1, Default::default(), limits);
    bed.witnessed = true;
    let mut image = vec![0; SIZE as usize];
    Rng::new(seed).fill(&mut image);
    bed.world.put_file(bed.node, &bed::path(0), &image);
    bed
}

fn log(bed: &Bed) -> Vec<u8> {
    bed.world.file(bed.node, &bed::log_path(0)).expect("there")
}

/// Overwrites a file where it stands, as a copying tool does it: it stays the same file.
fn put_back(bed: &mut Bed, path: &str, bytes: &[u8]) {
    let mut io = bed.world.io(bed.node);
    let file = loop {
        match io.open(path, OpenHow { write: true, ..OpenHow::default() }) {
            Ok(file) => break file,
            Err(_) => bed.world.advance(MS),
        }
    };
    for (page, content) in bytes.chunks(ALIGN).enumerate() {
        let mut buf = io.pool().take(ALIGN).expect("it has buffers");
        buf[..ALIGN].copy_from_slice(content);
        let part = Part { buf, at: 0, len: ALIGN };
        io.submit(7, Op::Write { file, offset: (page * ALIGN) as u64, part, durable: true });
        let mut done = Vec::new();
        while done.is_empty() {
            bed.world.step();
            io.poll(None, &mut done);
        }
        assert!(done[0].result.is_ok());
    }
    io.close(file);
}

fn hashed(bed: &Bed) -> u64 {
    bed.held.records.iter().filter(|r| r.kind == RecordKind::SyncHash).map(|r| u64::from(r.len)).sum()
}

/// Starts anew and waits until all is well: how much of the disk was compared.
fn starts(bed: &mut Bed) -> u64 {
    bed.restart();
    bed.unreachable = false;
    bed.held.records.clear();
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    bed.assert_equal();
    hashed(bed)
}

/// Protected, idle for long, so that no bit is set; the log as it is then.
fn quiet(bed: &mut Bed) -> Vec<u8> {
    bed.ready();
    bed.acked();
    bed.pass(5000 * MS);
    assert_eq!(bed.log_bits(0), []);
    log(bed)
}

/// Written and answered, and never sent.
fn write_unsent(bed: &mut Bed) {
    bed.unreachable = true;
    bed.cut();
    for extent in [1, 4, 7] {
        bed.write(0, extent * EXTENT + 8192, &[extent as u8; 4096]).expect("written");
    }
}

#[test]
fn an_older_copy_of_the_same_life_is_compared_in_full() {
    let mut bed = bed(1);
    let old = quiet(&mut bed);
    write_unsent(&mut bed);
    bed.world.crash(bed.node);
    put_back(&mut bed, &bed::log_path(0), &old);
    assert_eq!(starts(&mut bed), SIZE);
    // The next life goes on from there, with nothing to complain of.
    bed.pass(5000 * MS);
    bed.world.crash(bed.node);
    assert!(starts(&mut bed) <= EXTENT);
}

#[test]
fn an_older_copy_after_a_clean_stop_is_compared_in_full() {
    let mut bed = bed(2);
    let old = quiet(&mut bed);
    write_unsent(&mut bed);
    bed.unreachable = false;
    bed.until("protected", |bed| bed.is_protected());
    bed.source.stop(&mut bed.io);
    let stopped = |e: &SourceEvent| matches!(e, SourceEvent::Stopped { .. });
    bed.until("stopped", |bed| bed.events.iter().any(stopped));
    bed.world.crash(bed.node);
    put_back(&mut bed, &bed::log_path(0), &old);
    assert_eq!(starts(&mut bed), SIZE);
}

#[test]
fn a_copy_in_another_file_is_compared_in_full_without_a_witness_too() {
    let mut bed = bed(3);
    bed.witnessed = false;
    let old = quiet(&mut bed);
    write_unsent(&mut bed);
    bed.world.crash(bed.node);
    bed.world.put_file(bed.node, &bed::log_path(0), &old);
    assert_eq!(starts(&mut bed), SIZE);
}

#[test]
fn that_it_was_fenced_is_believed_of_an_older_copy() {
    let mut bed = bed(4);
    quiet(&mut bed);
    let mut old = log(&bed);
    let at = (0..2).max_by_key(|slot| IntentHeader::decode(&old[slot * ALIGN..]).map_or(0, |h| h.serial)).expect("two");
    let header = IntentHeader::decode(&old[at * ALIGN..]).expect("whole");
    old[at * ALIGN..][..ALIGN].copy_from_slice(&IntentHeader { fenced: true, ..header }.encode());
    write_unsent(&mut bed);
    bed.world.crash(bed.node);
    put_back(&mut bed, &bed::log_path(0), &old);
    bed.restart();
    let cookie = bed.ask(0, bed.write_request(0, &[1; 4096], false));
    bed.pass(3000 * MS);
    assert!(!bed.has_answer(cookie), "a source that was fenced answers");
}

/// A crash between any two steps, also between a log's write and its witness's: never taken for an older copy, and no
/// write is lost.
#[test]
fn no_crash_looks_like_an_older_copy() {
    let mut rng = Rng::new(5);
    let mut bed = bed(5);
    quiet(&mut bed);
    for life in 0..40 {
        bed.unreachable = true;
        bed.cut();
        for round in 0..6 {
            let at = rng.below(SIZE / 4096) * 4096;
            let request = bed.write_request(at, &[round + 1; 4096], false);
            bed.ask(0, request);
            for _ in 0..rng.below(6) {
                bed.step();
            }
        }
        for _ in 0..rng.below(12) {
            bed.step();
        }
        if life % 3 == 0 {
            bed.world.power_loss(bed.node);
        } else {
            bed.world.crash(bed.node);
        }
        bed.answers.clear();
        let compared = starts(&mut bed);
        assert!(compared <= 6 * EXTENT, "life {life}: {compared} bytes were compared");
        bed.pass(5000 * MS);
        assert_eq!(bed.log_bits(0), []);
    }
}

#[test]
fn the_witness_is_never_ahead_of_the_log() {
    let mut bed = bed(6);
    quiet(&mut bed);
    for step in 0..2000 {
        if step % 40 == 0 {
            let request = bed.write_request(step / 40 % 10 * EXTENT, &[9; 4096], false);
            bed.ask(0, request);
        }
        bed.step();
        let seen = bed.world.file(bed.node, &bed::witness_path(0)).expect("there");
        let seen = Witness::decode(&seen).expect("whole").serial;
        let reached = afterimage_dataplane::intent::load(&log(&bed), bed::disk_id(0), SIZE, bed::STREAM).serial;
        assert!(seen <= reached, "step {step}: {seen} of {reached}");
    }
}

#[test]
fn without_its_witness_a_log_is_believed() {
    for content in [None, Some(vec![0x5a; ALIGN]), Some(Vec::new())] {
        let mut bed = bed(7);
        quiet(&mut bed);
        write_unsent(&mut bed);
        bed.world.crash(bed.node);
        let mut io = bed.world.io(bed.node);
        io.remove(&bed::witness_path(0)).expect("it was there");
        if let Some(content) = content {
            bed.world.put_file(bed.node, &bed::witness_path(0), &content);
        }
        assert!(starts(&mut bed) <= 3 * EXTENT);
        // It is made again, and of use.
        let old = log(&bed);
        write_unsent(&mut bed);
        bed.world.crash(bed.node);
        put_back(&mut bed, &bed::log_path(0), &old);
        assert_eq!(starts(&mut bed), SIZE);
    }
}

#[test]
fn a_log_of_version_1_is_read_and_written_anew() {
    let mut bed = bed(8);
    quiet(&mut bed);
    write_unsent(&mut bed);
    bed.world.crash(bed.node);
    let mut old = log(&bed);
    for slot in 0..2 {
        let page = &mut old[slot * ALIGN..][..ALIGN];
        page[4] = 1;
        // It had no identity of the log; the field lies behind all others.
        let end = ALIGN - page.iter().rev().position(|b| *b != 0).expect("a header");
        page[end - 8..end].fill(0);
        sign(page);
    }
    for page in old[2 * ALIGN..].chunks_exact_mut(ALIGN) {
        page[12..16].fill(0);
        sign(page);
    }
    let mut io = bed.world.io(bed.node);
    io.remove(&bed::witness_path(0)).expect("it was there");
    bed.world.put_file(bed.node, &bed::log_path(0), &old);
    assert!(starts(&mut bed) <= 3 * EXTENT);
    let new = log(&bed);
    assert!((0..2).any(|slot| u16::from(new[slot * ALIGN + 4]) == INTENT_VERSION));
}

fn sign(page: &mut [u8]) {
    page[8..12].fill(0);
    let crc = crc32c::crc32c(page);
    page[8..12].copy_from_slice(&crc.to_le_bytes());
}
