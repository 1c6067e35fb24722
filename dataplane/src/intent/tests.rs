use super::*;
use crate::io::sim::{Rng, SimIo, World, WorldConfig};
use crate::io::{Class, OpenHow, Pool};

#[test]
fn what_was_being_read_when_an_incarnation_ends_is_read_again() {
    let pool = Pool::new(&[Class { capacity: 4096, count: 1 }]);
    let buf = pool.take(4096).expect("it has one");
    let loaded = Loaded {
        verdict: Verdict::Missing,
        serial: 0,
        slot: 0,
        extents: vec![1, 3, 5],
        torn: Vec::new(),
        rewrite: false,
    };
    let mut log = IntentLog::new(File(0), 0, 8 * EXTENT, IntentHeader::default(), &loaded, buf);
    log.sync_begin(EXTENT, 2 * EXTENT);
    log.sync_begin(3 * EXTENT, 4 * EXTENT);
    log.mark_dirty(3 * EXTENT, 4 * EXTENT);
    log.unacked_to_dirty(0);
    let mut seen = Vec::new();
    while let Some(extent) = log.next_dirty(0) {
        let start = u64::from(extent) * EXTENT;
        log.sync_begin(start, start + EXTENT);
        log.sync_done(start, start + EXTENT);
        seen.push(extent);
    }
    assert_eq!(seen, [1, 3, 5]);
}

const EXTENTS: u64 = 8192;

/// A clean log on a simulated disk.
fn clean_log(world: &World) -> (SimIo, IntentLog) {
    let node = world.node("source");
    let mut io = world.io(node);
    let size = EXTENTS * EXTENT;
    world.put_file(node, "/log", &vec![0; log_len(size) as usize]);
    let file = io.open("/log", OpenHow { write: true, ..OpenHow::default() }).expect("there");
    let buf = io.pool().take(4096).expect("it has buffers");
    let loaded =
        Loaded { verdict: Verdict::Missing, serial: 0, slot: 0, extents: Vec::new(), torn: Vec::new(), rewrite: false };
    let log = IntentLog::new(file, 7, size, IntentHeader::default(), &loaded, buf);
    (io, log)
}

/// Writes of the log that it took until nothing was left to write.
fn drain(world: &World, io: &mut SimIo, log: &mut IntentLog) -> usize {
    let mut writes = 0;
    loop {
        log.pump(io);
        if !log.in_flight() {
            return writes;
        }
        writes += 1;
        let mut done = Vec::new();
        while done.is_empty() {
            world.step();
            io.poll(None, &mut done);
        }
        done.into_iter().for_each(|done| assert!(!log.done(io, done)));
    }
}

#[test]
fn a_load_that_comes_everywhere_waits_for_few_writes_of_the_log() {
    let world = World::new(3, WorldConfig::default());
    let (mut io, mut log) = clean_log(&world);
    let mut rng = Rng::new(3);
    let covered = Covered { frame: 1, seq: 1, epoch: 0, bound: 64 };
    let mut later = 0;
    for second in 0..20 {
        for _ in 0..4000 {
            let start = rng.below(EXTENTS) * EXTENT;
            let ready = log.hold(start, start + 4096);
            let writes = drain(&world, &mut io, &mut log);
            assert!(ready || writes > 0);
            assert!(log.ready(start, start + 4096), "issued only once its bit is durable");
            log.release(start, start + 4096, Outcome { seq: Some(1), ..Outcome::default() });
            later += if second > 0 { writes } else { 0 };
        }
        log.tick(&covered);
        drain(&world, &mut io, &mut log);
        log.clear(&covered);
    }
    assert!(later < 76_000 / 50, "{later} of 76000 writes waited");
    // The load has ended: so do the marks.
    for _ in 0..100 {
        log.tick(&covered);
        drain(&world, &mut io, &mut log);
        log.clear(&covered);
    }
    assert!(log.hot() <= 64, "{} are marked", log.hot());
    assert_eq!((log.spread, log.cold), (1, COLD_TICKS));
}

#[test]
fn a_load_that_stays_marks_what_it_writes() {
    let world = World::new(4, WorldConfig::default());
    let (mut io, mut log) = clean_log(&world);
    for extent in [5, 900, 7000] {
        log.hold(extent * EXTENT, extent * EXTENT + 4096);
        drain(&world, &mut io, &mut log);
    }
    assert_eq!(log.hot(), 3);
}
