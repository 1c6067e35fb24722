//! The rules of `io`, held by both implementations: each case runs on the ring, with real files and sockets, and in the
//! simulated world.

use afterimage_dataplane::io::guest::{GuestMemory, Map, Region, Scatter, share};
use afterimage_dataplane::io::sim::Rng;
use afterimage_dataplane::io::{Errno, File, Io, Nanos, Op, OpenHow, Part};
use bed::{Bed, bytes, part};

mod bed;

const NEW: OpenHow = OpenHow { write: true, create_new: true, lock: false };
const WRITE: OpenHow = OpenHow { write: true, create_new: false, lock: false };
const READ: OpenHow = OpenHow { write: false, create_new: false, lock: false };
const LOCKED: OpenHow = OpenHow { write: true, create_new: false, lock: true };

type Files = (std::os::fd::OwnedFd, std::os::fd::OwnedFd);

/// Two mappings that lie side by side in the guest, filled with 0xee.
fn shared() -> (Files, GuestMemory) {
    let (first, second) = (share("one", 65_536).unwrap(), share("two", 65_536).unwrap());
    let region = |guest, map: Map| Region { guest, user: guest, map: std::sync::Arc::new(map) };
    let memory = GuestMemory::new(vec![region(0, first.1), region(65_536, second.1)]).unwrap();
    memory.write(0, &[0xee; 131_072]).unwrap();
    ((first.0, second.0), memory)
}

fn ranges(memory: &GuestMemory, ranges: &[(u64, usize)]) -> Scatter {
    let mut to = Scatter::default();
    ranges.iter().for_each(|(at, len)| memory.add_to(&mut to, *at, *len).unwrap());
    to
}

/// Each case as a test of its own, on both beds.
macro_rules! cases {
    ($(fn $name:ident($bed:ident: &mut impl Bed) $body:block)*) => {
        $(fn $name($bed: &mut impl Bed) $body)*
        mod ring {
            $(#[test] fn $name() { super::$name(&mut super::bed::RingBed::new()) })*
        }
        mod sim {
            $(#[test] fn $name() {
                for seed in 0..20 {
                    super::$name(&mut super::bed::SimBed::new(seed));
                }
            })*
        }
    };
}

cases! {
    fn what_is_written_is_read(bed: &mut impl Bed) {
        let path = bed.path("f");
        let file = bed.io().open(&path, NEW).unwrap();
        let data = bytes(1, 64 * 1024);
        let source = part(bed.io(), 0, &data);
        let done = bed.run(7, Op::Write { file, offset: 8192, part: source, durable: false });
        assert_eq!((done.token, done.result), (7, Ok(64 * 1024)));
        assert_eq!(done.part.expect("the buffer comes back").len, 64 * 1024);
        let target = part(bed.io(), 4096, &vec![0; 64 * 1024]);
        let done = bed.run(8, Op::Read { file, offset: 8192, part: target });
        assert_eq!(done.result, Ok(64 * 1024));
        let back = done.part.expect("the buffer comes back");
        assert!(back.buf[4096..4096 + 64 * 1024] == data[..]);
        assert_eq!(bed.io().info(file).unwrap().size, 8192 + 64 * 1024);
    }

    fn a_gap_reads_as_zeros(bed: &mut impl Bed) {
        let path = bed.path("f");
        let file = bed.io().open(&path, NEW).unwrap();
        bed.write(file, 65536, &bytes(1, 4096));
        assert!(bed.read(file, 4096, 8192).unwrap().iter().all(|b| *b == 0));
    }

    fn a_read_past_the_end_is_an_error(bed: &mut impl Bed) {
        let path = bed.path("f");
        let file = bed.io().open(&path, NEW).unwrap();
        bed.write(file, 0, &bytes(1, 8192));
        assert_eq!(bed.read(file, 4096, 8192), Err(Errno::IO));
        assert_eq!(bed.read(file, 8192, 4096), Err(Errno::IO));
        assert!(bed.read(file, 4096, 4096).is_ok());
    }

    fn a_read_fills_ranges_of_shared_memory_in_order(bed: &mut impl Bed) {
        let path = bed.path("f");
        let file = bed.io().open(&path, NEW).unwrap();
        let data = bytes(1, 64 * 1024);
        bed.write(file, 0, &data);
        let (maps, memory) = shared();
        // Two pieces of one mapping, in the other order, and one over the seam to the next.
        let to = ranges(&memory, &[(40_960, 8192), (4096, 4096), (61_440, 8192)]);
        let done = bed.run(3, Op::ReadInto { file, offset: 4096, to });
        assert_eq!((done.token, done.result), (3, Ok(20_480)));
        assert!(done.part.is_none() && done.parts.is_empty());
        let mut expected = [vec![0xee; 65_536], vec![0xee; 65_536]].concat();
        expected[40_960..49_152].copy_from_slice(&data[4096..12_288]);
        expected[4096..8192].copy_from_slice(&data[12_288..16_384]);
        expected[61_440..69_632].copy_from_slice(&data[16_384..24_576]);
        let mut found = vec![0; 131_072];
        memory.read(0, &mut found).unwrap();
        assert!(found == expected, "these bytes, and no others");
        drop(maps);
    }

    fn a_read_into_shared_memory_fails_as_others_do(bed: &mut impl Bed) {
        let path = bed.path("f");
        let file = bed.io().open(&path, NEW).unwrap();
        bed.write(file, 0, &bytes(1, 8192));
        let (_maps, memory) = shared();
        let ends = [(4096, (0, 8192), Err(Errno::IO)), (8192, (0, 4096), Err(Errno::IO)), (4096, (4096, 4096), Ok(4096))];
        for (offset, range, end) in ends {
            let to = ranges(&memory, &[range]);
            assert_eq!(bed.run(3, Op::ReadInto { file, offset, to }).result, end);
        }
    }

    fn a_mapping_lives_as_long_as_a_read_into_it(bed: &mut impl Bed) {
        let path = bed.path("f");
        let file = bed.io().open(&path, NEW).unwrap();
        let data = bytes(1, 65_536);
        bed.write(file, 0, &data);
        let (maps, memory) = shared();
        let to = ranges(&memory, &[(0, 65_536)]);
        let same = Map::new(std::os::fd::AsFd::as_fd(&maps.0), 0, 65_536).unwrap();
        let weak = std::sync::Arc::downgrade(&memory.regions()[0].map);
        drop(memory);
        bed.io().submit(3, Op::ReadInto { file, offset: 0, to });
        assert!(weak.upgrade().is_some());
        assert_eq!(bed.wait().result, Ok(65_536));
        assert!(weak.upgrade().is_none(), "and no longer");
        let mut found = vec![0; 65_536];
        same.read(0, &mut found).unwrap();
        assert!(found == data);
    }

    fn a_read_into_memory_that_has_gone_is_an_error(bed: &mut impl Bed) {
        let path = bed.path("f");
        let file = bed.io().open(&path, NEW).unwrap();
        bed.write(file, 0, &bytes(1, 65_536));
        let whole = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&whole, 65_536).unwrap();
        let map = std::sync::Arc::new(Map::new(std::os::fd::AsFd::as_fd(&whole), 0, 65_536).unwrap());
        let memory = GuestMemory::new(vec![Region { guest: 0, user: 0, map }]).unwrap();
        let to = ranges(&memory, &[(0, 65_536)]);
        rustix::fs::ftruncate(&whole, 8192).unwrap();
        assert_eq!(bed.run(3, Op::ReadInto { file, offset: 0, to }).result, Err(Errno::FAULT));
    }

    fn a_write_without_permission_is_an_error(bed: &mut impl Bed) {
        let path = bed.path("f");
        let file = bed.io().open(&path, NEW).unwrap();
        bed.write(file, 0, &bytes(1, 4096));
        bed.io().close(file);
        let file = bed.io().open(&path, READ).unwrap();
        let source = part(bed.io(), 0, &bytes(2, 4096));
        let done = bed.run(1, Op::Write { file, offset: 0, part: source, durable: false });
        assert_eq!(done.result, Err(Errno::BADF));
        assert!(done.part.is_some(), "the buffer comes back on errors too");
    }

    fn durable_writes_and_syncs_succeed(bed: &mut impl Bed) {
        let path = bed.path("f");
        let file = bed.io().open(&path, NEW).unwrap();
        let source = part(bed.io(), 0, &bytes(2, 16384));
        let done = bed.run(1, Op::Write { file, offset: 0, part: source, durable: true });
        assert_eq!(done.result, Ok(16384));
        assert_eq!(bed.run(2, Op::Sync { file }).result, Ok(0));
    }

    fn a_zeroed_range_reads_as_zeros(bed: &mut impl Bed) {
        for unmap in [true, false] {
            let path = bed.path(if unmap { "unmapped" } else { "kept" });
            let file = bed.io().open(&path, NEW).unwrap();
            let data = bytes(3, 128 * 1024);
            bed.write(file, 0, &data);
            let done = bed.run(1, Op::Zero { file, offset: 8192, len: 65536, unmap });
            assert_eq!(done.result, Ok(0));
            let back = bed.read(file, 0, 128 * 1024).unwrap();
            assert!(back[..8192] == data[..8192] && back[73728..] == data[73728..]);
            assert!(back[8192..73728].iter().all(|b| *b == 0));
            assert_eq!(bed.io().info(file).unwrap().size, 128 * 1024);
        }
    }

    fn zeroing_past_the_end_keeps_the_length(bed: &mut impl Bed) {
        let path = bed.path("f");
        let file = bed.io().open(&path, NEW).unwrap();
        bed.write(file, 0, &bytes(3, 8192));
        assert_eq!(bed.run(1, Op::Zero { file, offset: 4096, len: 65536, unmap: false }).result, Ok(0));
        assert_eq!(bed.io().info(file).unwrap().size, 8192);
    }

    fn holes_are_told_from_data(bed: &mut impl Bed) {
        let path = bed.path("f");
        let file = bed.io().open(&path, NEW).unwrap();
        bed.io().set_len(file, 1 << 20, false).unwrap();
        bed.write(file, 256 * 1024, &bytes(1, 65536));
        let (mut at, mut data) = (0, Vec::new());
        while at < 1 << 20 {
            let allocation = bed.io().allocation(file, at).unwrap();
            assert!(allocation.len > 0);
            if !allocation.hole {
                data.push((at, allocation.len));
            }
            at += allocation.len;
        }
        assert_eq!(at, 1 << 20);
        assert_eq!(data, [(256 * 1024, 65536)]);
    }

    fn a_length_can_be_set_and_allocated(bed: &mut impl Bed) {
        let path = bed.path("f");
        let file = bed.io().open(&path, NEW).unwrap();
        bed.io().set_len(file, 1 << 20, true).unwrap();
        assert_eq!(bed.io().info(file).unwrap().size, 1 << 20);
        assert!(bed.read(file, (1 << 20) - 4096, 4096).unwrap().iter().all(|b| *b == 0));
        bed.io().set_len(file, 8192, false).unwrap();
        assert_eq!(bed.io().info(file).unwrap().size, 8192);
        assert_eq!(bed.io().set_len(file, 1 << 43, true), Err(Errno::NOSPC));
        assert_eq!(bed.io().info(file).unwrap().size, 8192);
    }

    fn a_file_is_made_beside_the_thread(bed: &mut impl Bed) {
        let path = bed.path("made");
        let done = bed.run(7, Op::Create { path: path.clone(), len: 1 << 20 });
        let file = File(done.result.unwrap() as u32);
        assert_eq!((done.token, bed.io().info(file).unwrap().size), (7, 1 << 20));
        assert!(bed.read(file, (1 << 20) - 4096, 4096).unwrap().iter().all(|b| *b == 0));
        assert_eq!(bed.io().open(&path, LOCKED), Err(Errno::AGAIN));
        let dir = path.rsplit_once('/').map_or(".", |(dir, _)| dir).to_owned();
        assert_eq!(bed.run(8, Op::SyncDir { dir }).result, Ok(0));
        bed.write(file, 4096, &bytes(5, 8192));
        assert_eq!(bed.read(file, 4096, 8192).unwrap(), bytes(5, 8192));
        assert_eq!(bed.run(9, Op::Create { path: path.clone(), len: 4096 }).result, Err(Errno::EXIST));
        assert_eq!(bed.io().info(file).unwrap().size, 1 << 20);
        let vast = bed.path("vast");
        assert_eq!(bed.run(10, Op::Create { path: vast.clone(), len: 1 << 43 }).result, Err(Errno::NOSPC));
        assert_eq!(bed.io().open(&vast, READ), Err(Errno::NOENT));
        bed.io().close(file);
        assert!(bed.io().open(&path, LOCKED).is_ok());
        assert_eq!(bed.run(11, Op::SyncDir { dir: bed.path("none") }).result, Err(Errno::NOENT));
    }

    fn files_say_what_they_are(bed: &mut impl Bed) {
        let path = bed.path("f");
        let file = bed.io().open(&path, NEW).unwrap();
        bed.write(file, 0, &bytes(1, 4096));
        let info = bed.io().info(file).unwrap();
        assert!(info.block.is_power_of_two() && (512..=4096).contains(&info.block));
        assert!(info.physical_block >= info.block);
        assert!(!info.device && info.discard && info.mtime_ns > 1_500_000_000_000_000_000);
    }

    fn opening_fails_as_the_kernel_says(bed: &mut impl Bed) {
        let (path, dir) = (bed.path("f"), bed.path("d"));
        assert_eq!(bed.io().open(&path, WRITE), Err(Errno::NOENT));
        let file = bed.io().open(&path, NEW).unwrap();
        assert_eq!(bed.io().open(&path, NEW), Err(Errno::EXIST));
        bed.io().close(file);
        bed.io().list(&dir).unwrap();
        assert_eq!(bed.io().open(&dir, WRITE), Err(Errno::ISDIR));
        let nowhere = bed.path("missing/f");
        assert_eq!(bed.io().open(&nowhere, NEW), Err(Errno::NOENT));
    }

    fn a_lock_keeps_a_second_opener_out(bed: &mut impl Bed) {
        let path = bed.path("f");
        let first = bed.io().open(&path, OpenHow { lock: true, ..NEW }).unwrap();
        assert_eq!(bed.io().open(&path, LOCKED), Err(Errno::AGAIN));
        let unlocked = bed.io().open(&path, WRITE).unwrap();
        bed.io().close(first);
        let second = bed.io().open(&path, LOCKED).unwrap();
        bed.io().close(unlocked);
        assert_eq!(bed.io().open(&path, LOCKED), Err(Errno::AGAIN));
        bed.io().close(second);
        bed.io().open(&path, LOCKED).unwrap();
    }

    fn a_file_closes_after_its_last_operation(bed: &mut impl Bed) {
        let path = bed.path("f");
        let file = bed.io().open(&path, OpenHow { lock: true, ..NEW }).unwrap();
        let source = part(bed.io(), 0, &bytes(9, 65536));
        bed.io().submit(1, Op::Write { file, offset: 0, part: source, durable: true });
        bed.io().close(file);
        assert_eq!(bed.io().open(&path, LOCKED), Err(Errno::AGAIN));
        assert_eq!(bed.wait().result, Ok(65536));
        let file = bed.io().open(&path, LOCKED).unwrap();
        assert_eq!(bed.read(file, 0, 65536).unwrap(), bytes(9, 65536));
    }

    fn many_files_come_and_go(bed: &mut impl Bed) {
        for round in 0..40 {
            let mut files = Vec::new();
            for n in 0..8 {
                let path = bed.path(&format!("{round}-{n}"));
                files.push((n, bed.io().open(&path, NEW).unwrap()));
            }
            for (n, file) in &files {
                bed.write(*file, 0, &bytes(*n, 4096));
            }
            for (n, file) in files {
                assert_eq!(bed.read(file, 0, 4096).unwrap(), bytes(n, 4096));
                bed.io().close(file);
                let path = bed.path(&format!("{round}-{n}"));
                bed.io().remove(&path).unwrap();
            }
        }
    }

    fn names_are_listed_renamed_and_removed(bed: &mut impl Bed) {
        let dir = bed.path("d/e");
        assert!(bed.io().list(&dir).unwrap().is_empty());
        let (a, b) = (bed.path("d/e/a"), bed.path("d/e/b"));
        bed.io().open(&a, NEW).unwrap();
        assert_eq!(bed.io().list(&dir).unwrap(), ["a"]);
        bed.io().rename(&a, &b).unwrap();
        bed.io().sync_dir(&dir).unwrap();
        assert_eq!(bed.io().list(&dir).unwrap(), ["b"]);
        let outer = bed.path("d");
        assert_eq!(bed.io().list(&outer).unwrap(), ["e"]);
        bed.io().remove(&b).unwrap();
        assert_eq!(bed.io().remove(&b), Err(Errno::NOENT));
        assert_eq!(bed.io().rename(&a, &b), Err(Errno::NOENT));
        assert!(bed.io().list(&dir).unwrap().is_empty());
    }

    fn a_removed_file_lives_while_it_is_open(bed: &mut impl Bed) {
        let path = bed.path("f");
        let file = bed.io().open(&path, NEW).unwrap();
        bed.write(file, 0, &bytes(1, 4096));
        bed.io().remove(&path).unwrap();
        assert_eq!(bed.read(file, 0, 4096).unwrap(), bytes(1, 4096));
        bed.io().open(&path, NEW).unwrap();
    }

    fn small_files_are_replaced_whole(bed: &mut impl Bed) {
        let (dir, path) = (bed.path("d"), bed.path("d/table"));
        bed.io().list(&dir).unwrap();
        assert_eq!(bed.io().read_small(&path), Err(Errno::NOENT));
        bed.io().replace_small(&path, b"one").unwrap();
        bed.io().replace_small(&path, &bytes(4, 10_000)).unwrap();
        assert_eq!(bed.io().read_small(&path).unwrap(), bytes(4, 10_000));
        bed.io().replace_small(&path, b"").unwrap();
        assert_eq!(bed.io().read_small(&path).unwrap(), b"");
        assert_eq!(bed.io().list(&dir).unwrap(), ["table"]);
        assert!(bed.io().free_space(&dir).unwrap() > 1 << 20);
    }

    fn a_long_random_run_equals_its_model(bed: &mut impl Bed) {
        let path = bed.path("f");
        let file = bed.io().open(&path, NEW).unwrap();
        let block = u64::from(bed.io().info(file).unwrap().block);
        let mut rng = Rng::new(11);
        let mut model: Vec<u8> = Vec::new();
        for round in 0..150 {
            let offset = rng.below(200_000 / block) * block;
            let len = (1 + rng.below(30_000 / block)) * block;
            let end = (offset + len) as usize;
            match rng.below(8) {
                0..4 => {
                    let data = bytes(round, len as usize);
                    bed.write(file, offset, &data);
                    model.resize(model.len().max(end), 0);
                    model[offset as usize..end].copy_from_slice(&data);
                }
                4..6 => {
                    let unmap = rng.chance(0.5);
                    assert_eq!(bed.run(1, Op::Zero { file, offset, len, unmap }).result, Ok(0));
                    let end = end.min(model.len());
                    if (offset as usize) < end {
                        model[offset as usize..end].fill(0);
                    }
                }
                6 => {
                    bed.io().set_len(file, offset, rng.chance(0.5)).unwrap();
                    model.resize(offset as usize, 0);
                }
                _ => assert_eq!(bed.run(1, Op::Sync { file }).result, Ok(0)),
            }
            let size = model.len() as u64;
            assert_eq!(bed.io().info(file).unwrap().size, size);
            if size > 0 {
                let offset = rng.below(size / block) * block;
                let len = (size - offset).min(64 * 1024);
                let expected = &model[offset as usize..(offset + len) as usize];
                assert!(bed.read(file, offset, len as usize).unwrap() == expected, "round {round}");
                if bed.io().allocation(file, offset).unwrap().hole {
                    let len = bed.io().allocation(file, offset).unwrap().len as usize;
                    assert!(model[offset as usize..][..len].iter().all(|b| *b == 0), "no hole, round {round}");
                }
            }
        }
    }

    fn many_operations_at_once_all_complete(bed: &mut impl Bed) {
        let path = bed.path("f");
        let file = bed.io().open(&path, NEW).unwrap();
        bed.io().set_len(file, 512 * 4096, true).unwrap();
        // More than the submission queue of the test's ring takes.
        for n in 0..200u64 {
            let source = part(bed.io(), 0, &bytes(n, 4096));
            bed.io().submit(n, Op::Write { file, offset: n * 4096, part: source, durable: false });
        }
        let mut seen = [false; 200];
        for _ in 0..200 {
            let done = bed.wait();
            assert_eq!(done.result, Ok(4096));
            assert!(!std::mem::replace(&mut seen[done.token as usize], true));
        }
        for n in 0..200 {
            assert_eq!(bed.read(file, n * 4096, 4096).unwrap(), bytes(n, 4096));
        }
    }

    fn bytes_cross_a_socket_in_order(bed: &mut impl Bed) {
        let (a, b) = bed.pair();
        let data = bytes(5, 3 << 20);
        let sent = part(bed.io(), 64, &data);
        bed.io().submit(1, Op::Send { sock: a, part: sent });
        let mut got = Vec::new();
        let mut sending = true;
        let target = part(bed.io(), 0, &[0; 70_000]);
        bed.io().submit(2, Op::Recv { sock: b, part: target });
        while got.len() < data.len() || sending {
            let done = bed.wait();
            match done.token {
                1 => {
                    assert_eq!(done.result, Ok(3 << 20));
                    sending = false;
                }
                _ => {
                    let len = done.result.unwrap() as usize;
                    let part = done.part.unwrap();
                    assert!(len > 0 && len <= part.len);
                    got.extend_from_slice(&part.buf[..len]);
                    if got.len() < data.len() {
                        bed.io().submit(2, Op::Recv { sock: b, part });
                    }
                }
            }
        }
        assert!(got == data);
    }

    fn gathered_and_scattered_parts_keep_their_order(bed: &mut impl Bed) {
        let (a, b) = bed.pair();
        let data = bytes(6, 700_000);
        let parts: Vec<Part> = data.chunks(100_000).map(|chunk| part(bed.io(), 3, chunk)).collect();
        bed.io().submit(1, Op::SendV { sock: a, parts });
        let mut got = Vec::new();
        let mut sending = true;
        let mut receiving = false;
        while got.len() < data.len() || sending {
            if got.len() < data.len() && !receiving {
                let parts = (0..5).map(|n| part(bed.io(), n, &[0; 9_000])).collect();
                bed.io().submit(2, Op::RecvV { sock: b, parts });
                receiving = true;
            }
            let done = bed.wait();
            if done.token == 1 {
                assert_eq!((done.result, done.parts.len()), (Ok(700_000), 7));
                sending = false;
                continue;
            }
            receiving = false;
            let mut left = done.result.unwrap() as usize;
            assert!(left > 0 && left <= 45_000);
            assert_eq!(done.parts.len(), 5);
            for part in &done.parts {
                let take = left.min(part.len);
                got.extend_from_slice(&part.buf[part.at..part.at + take]);
                left -= take;
            }
        }
        assert!(got == data);
    }

    fn a_closed_peer_is_the_end_of_the_stream(bed: &mut impl Bed) {
        let (a, b) = bed.pair();
        let sent = part(bed.io(), 0, b"last words");
        assert_eq!(bed.run(1, Op::Send { sock: a, part: sent }).result, Ok(10));
        bed.io().close_sock(a);
        let mut got = Vec::new();
        loop {
            let target = part(bed.io(), 0, &[0; 64]);
            let done = bed.run(2, Op::Recv { sock: b, part: target });
            match done.result.unwrap() as usize {
                0 => break,
                len => got.extend_from_slice(&done.part.unwrap().buf[..len]),
            }
        }
        assert_eq!(got, b"last words");
    }

    fn closing_a_socket_ends_its_operations(bed: &mut impl Bed) {
        let (a, _b) = bed.pair();
        let target = part(bed.io(), 0, &[0; 64]);
        bed.io().submit(1, Op::Recv { sock: a, part: target });
        // More than any socket buffer takes: it waits for a reader that never comes.
        let parts = (0..3).map(|_| part(bed.io(), 0, &vec![7; 4 << 20])).collect();
        bed.io().submit(2, Op::SendV { sock: a, parts });
        bed.settle(20_000_000);
        bed.io().close_sock(a);
        let (mut received, mut sent) = (None, None);
        for _ in 0..2 {
            let done = bed.wait();
            match done.token {
                1 => received = Some((done.result, done.part.is_some())),
                _ => sent = Some((done.result, done.parts.len())),
            }
        }
        let (result, back) = received.expect("the receive ended");
        assert!(back && !matches!(result, Ok(1..)), "{result:?}");
        assert_eq!(sent, Some((Err(Errno::PIPE), 3)));
    }

    fn sending_to_a_closed_peer_fails(bed: &mut impl Bed) {
        let (a, b) = bed.pair();
        bed.io().close_sock(b);
        for _ in 0..100 {
            let sent = part(bed.io(), 0, &[1; 4096]);
            match bed.run(1, Op::Send { sock: a, part: sent }).result {
                Ok(_) => bed.settle(2_000_000),
                Err(error) => {
                    assert!(error == Errno::PIPE || error == Errno::CONNRESET, "{error:?}");
                    return;
                }
            }
        }
        panic!("a closed peer took everything");
    }

    fn timers_complete_in_their_order_and_not_early(bed: &mut impl Bed) {
        let start = bed.io().now();
        let times: [Nanos; 4] = [3_000_000, 1_000_000, 2_000_000, 0];
        for (token, after) in times.iter().enumerate() {
            bed.io().submit(token as u64, Op::Timer { at: start + after });
        }
        for token in [3, 1, 2, 0] {
            let done = bed.wait();
            assert_eq!((done.token, done.result), (token, Ok(0)));
            assert!(bed.io().now() >= start + times[token as usize]);
        }
    }

    fn a_poll_without_waiting_returns(bed: &mut impl Bed) {
        let mut done = Vec::new();
        bed.io().poll(None, &mut done);
        assert!(done.is_empty());
    }

    fn random_bytes_differ(bed: &mut impl Bed) {
        let (mut a, mut b) = ([0; 32], [0; 32]);
        bed.io().random(&mut a);
        bed.io().random(&mut b);
        assert!(a != b && a != [0; 32]);
        assert_eq!(bed.io().boot_id(), bed.io().boot_id());
        assert_ne!(bed.io().boot_id(), [0; 16]);
        assert!(bed.io().wall() > 1_500_000_000_000_000_000);
    }
}
