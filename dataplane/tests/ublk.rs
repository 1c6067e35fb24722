//! The ublk front end in the simulated world: every operation, errors, recovery at every step, disks that go and come.

#[path = "ublk/rig.rs"]
#[allow(dead_code)]
mod rig;

use std::collections::BTreeMap;

use afterimage_dataplane::host::{DiskKey, FrontEnd as _};
use afterimage_dataplane::io::ublk::uapi::{Descriptor, op, op_flag};
use afterimage_dataplane::io::{Class, Errno};
use afterimage_dataplane::ublk::MAX_REQUEST;
use rig::bed::{MemDisk, classes, pattern};
use rig::{Rig, SIZE};

#[test]
fn each_operation_does_what_it_says() {
    let mut rig = Rig::new(1);
    let data = pattern(1, 12288);
    let write = rig.write(8192, &data);
    assert_eq!(rig.result(write), 12288);
    let read = rig.read(8192 + 512, 4096);
    let answer = rig.answer(read);
    assert_eq!((answer.result, &answer.data[..]), (4096, &data[512..4608]));
    let flush = rig.ask(0, u32::from(op::FLUSH), 0, Vec::new(), 0);
    assert_eq!((rig.result(flush), rig.disks.0[0].flushes), (0, 1));
    assert_eq!(rig.disks.0[0].durable_writes, 0);
    let durable = rig.ask(0, u32::from(op::WRITE) | op_flag::FUA, 0, vec![1; 512], 512);
    assert_eq!((rig.result(durable), rig.disks.0[0].durable_writes), (512, 1));
    let kept = rig.ask(0, u32::from(op::WRITE_ZEROES) | op_flag::NOUNMAP, 8192, Vec::new(), 4096);
    assert_eq!(rig.result(kept), 0);
    assert!(rig.disks.0[0].data[8192..12288].iter().all(|b| *b == 0) && rig.disks.0[0].written[2]);
    let zero = rig.ask(0, u32::from(op::WRITE_ZEROES), 8192, Vec::new(), 4096);
    assert_eq!((rig.result(zero), rig.disks.0[0].written[2]), (0, false));
    let discard = rig.ask(0, u32::from(op::DISCARD), 12288, Vec::new(), 4096);
    assert_eq!((rig.result(discard), rig.disks.0[0].written[3]), (0, false));
    assert_eq!(rig.disks.0[0].data[16384..20480], data[8192..]);
    assert!(rig.free());
}

#[test]
fn a_long_request_is_done_in_pieces_and_answered_once() {
    let mut rig = Rig::new(2);
    let data = pattern(2, MAX_REQUEST as usize);
    // Across a multiple of the longest piece.
    let write = rig.write(100 * 512, &data);
    assert_eq!(rig.result(write), MAX_REQUEST as i32);
    assert_eq!(rig.disks.0[0].requests, 2);
    let read = rig.read(100 * 512, MAX_REQUEST as usize);
    assert_eq!(rig.answer(read).data, data);
    assert!(rig.free());
}

#[test]
fn errors_reach_the_host_and_the_device_goes_on() {
    let mut rig = Rig::new(3);
    rig.disks.0[0].fail = Some((4096..8192, Errno::NOSPC));
    let bad = rig.write(4096, &[1; 512]);
    assert_eq!(rig.result(bad), -28);
    // Only a part of it fails: so does all of it.
    rig.disks.0[0].fail = Some((512 * 1024..512 * 1024 + 512, Errno::IO));
    let half = rig.read(512 * 1024 - 4096, 8192);
    assert_eq!(rig.result(half), -5);
    for (op_flags, sectors, start) in
        [(77, 8, 0), (0, 8, SIZE / 512), (1, 0, 0), (1, u32::MAX, 0), (0, 8, u64::MAX), (3, 2, SIZE / 512 - 1)]
    {
        let wrong = rig.raw(0, Descriptor { op_flags, nr_sectors: sectors, start_sector: start, addr: 0 }, Vec::new());
        assert!(rig.result(wrong) < 0, "{op_flags} {sectors} {start}");
    }
    let good = rig.write(0, &[7; 512]);
    assert_eq!(rig.result(good), 512);
    assert!(rig.free());
}

#[test]
fn a_read_only_disk_is_not_written_to() {
    let mut disk = MemDisk::new(7, "view", SIZE as usize);
    disk.export.geometry.read_only = true;
    let mut rig = Rig::with(4, vec![disk], classes());
    let write = rig.write(0, &[1; 512]);
    assert_eq!(rig.result(write), -1);
    let read = rig.read(0, 512);
    assert_eq!(rig.result(read), 512);
    assert!(rig.disks.0[0].data.iter().all(|b| *b == 0));
}

#[test]
fn want_of_buffers_is_waited_out() {
    let mut rig = Rig::new(5);
    rig.disks.0[0].no_buffers = 40;
    let reads: Vec<u64> = (0..4).map(|n| rig.read(n * 4096, 4096)).collect();
    for read in reads {
        assert_eq!(rig.result(read), 4096);
    }
    // One long buffer in all, and requests for ten of them.
    let few = vec![Class { capacity: 16 * 1024, count: 2 }, Class { capacity: 80 * 1024, count: 2 }];
    let mut rig = Rig::with(6, vec![MemDisk::new(7, "disk", SIZE as usize)], few);
    let data = pattern(3, 256 * 1024);
    let writes: Vec<u64> = (0..10).map(|n| rig.write(n * 256 * 1024, &data)).collect();
    for write in writes {
        assert_eq!(rig.result(write), 256 * 1024);
    }
    assert!(rig.disks.0[0].data[..10 * 256 * 1024].chunks(256 * 1024).all(|chunk| chunk == data));
    assert!(rig.free());
}

/// A model of what a host knows of a disk: each slot is written by one request at a time.
struct Host {
    slots: Vec<Vec<u8>>,
    busy: BTreeMap<u64, (usize, Vec<u8>, u8)>,
}

const SLOT: usize = 16 * 1024;

impl Host {
    fn new(slots: usize) -> Self {
        Self { slots: vec![vec![0; SLOT]; slots], busy: BTreeMap::new() }
    }

    /// Asks for something in a slot that is free.
    fn ask(&mut self, rig: &mut Rig, device: usize, n: u64) {
        let slot = rig.rng.below(self.slots.len() as u64) as usize;
        if self.busy.values().any(|(busy, ..)| *busy == slot) {
            return;
        }
        let offset = (slot * SLOT) as u64;
        let (kind, content, data) = match rig.rng.below(6) {
            0..=2 => (op::WRITE, pattern(n, SLOT), pattern(n, SLOT)),
            3 => (op::WRITE_ZEROES, vec![0; SLOT], Vec::new()),
            _ => (op::READ, self.slots[slot].clone(), vec![0x11; SLOT]),
        };
        let request = rig.ask(device, u32::from(kind), offset, data, SLOT as u64);
        self.busy.insert(request, (slot, content, kind));
    }

    /// Takes the answers that have come.
    fn hear(&mut self, rig: &mut Rig) {
        rig.harvest();
        let known: Vec<u64> = self.busy.keys().copied().filter(|id| rig.answers.contains_key(id)).collect();
        for id in known {
            let (Some(answer), Some((slot, content, kind))) = (rig.answers.remove(&id), self.busy.remove(&id)) else {
                unreachable!("both are there")
            };
            let bytes = if kind == op::WRITE_ZEROES { 0 } else { SLOT as i32 };
            assert_eq!(answer.result, bytes, "a request failed");
            if kind == op::READ {
                assert!(answer.data == content, "slot {slot} reads as something else than was written");
            }
            self.slots[slot] = content;
        }
    }

    fn end(mut self, rig: &mut Rig, device: usize) {
        for _ in 0..100_000 {
            self.hear(rig);
            if self.busy.is_empty() {
                break;
            }
            assert!(rig.step(), "the world stands still, and {} requests are not answered", self.busy.len());
        }
        assert!(self.busy.is_empty(), "not all is answered");
        for (slot, content) in self.slots.iter().enumerate() {
            assert!(rig.disks.0[device].data[slot * SLOT..][..SLOT] == content[..], "slot {slot} on the disk");
        }
    }
}

#[test]
fn random_work_is_done_exactly_and_answered_once() {
    for seed in 0..20 {
        let mut rig = Rig::new(100 + seed);
        rig.disks.0[0].late = seed % 2 == 0;
        let mut host = Host::new(64);
        for n in 0..300 {
            host.ask(&mut rig, 0, n);
            rig.steps((n % 3) as usize);
            host.hear(&mut rig);
        }
        host.end(&mut rig, 0);
        assert!(rig.free());
    }
}

#[test]
fn after_a_crash_at_any_step_every_request_is_answered_once_and_none_fails() {
    for crash_at in 0..120 {
        let mut rig = Rig::new(1000 + crash_at);
        rig.disks.0[0].late = crash_at % 2 == 0;
        let mut host = Host::new(24);
        for n in 0..40 {
            host.ask(&mut rig, 0, n);
        }
        rig.steps(crash_at as usize);
        host.hear(&mut rig);
        rig.crash();
        for n in 40..60 {
            host.ask(&mut rig, 0, n);
            rig.steps(1);
            host.hear(&mut rig);
        }
        rig.crash();
        host.end(&mut rig, 0);
        assert!(rig.free());
    }
}

#[test]
fn a_clean_stop_answers_what_is_under_way_and_leaves_the_rest_to_the_next_process() {
    for stop_at in 0..60 {
        let mut rig = Rig::new(2000 + stop_at);
        rig.disks.0[0].late = true;
        let mut host = Host::new(48);
        for n in 0..60 {
            host.ask(&mut rig, 0, n);
        }
        rig.steps(stop_at as usize);
        rig.server.shutdown(&mut rig.io);
        for _ in 0..10_000 {
            if rig.server.is_idle() {
                break;
            }
            assert!(rig.step(), "it does not come to rest");
        }
        assert!(rig.server.is_idle());
        // The ring sends what was answered last.
        rig.steps(4);
        host.hear(&mut rig);
        let before = rig.disks.0[0].requests;
        rig.steps(50);
        assert_eq!(rig.disks.0[0].requests, before, "something is asked of a disk after the end");
        rig.crash();
        host.end(&mut rig, 0);
    }
}

#[test]
fn a_disk_that_goes_away_answers_with_no_error_when_it_is_back() {
    for at in 0..40 {
        let mut rig = Rig::new(3000 + at);
        rig.disks.0[0].late = true;
        let mut host = Host::new(32);
        for n in 0..40 {
            host.ask(&mut rig, 0, n);
        }
        rig.steps(at as usize);
        host.hear(&mut rig);
        rig.disks.0[0].shut();
        rig.steps(20);
        host.hear(&mut rig);
        // Gone; with its answers, or with a word.
        let mut disk = rig.disks.0.remove(0);
        if at % 2 == 0 {
            rig.server.close_export(&mut rig.io, DiskKey(7));
        }
        for n in 40..50 {
            host.ask(&mut rig, 0, n);
            rig.steps(3);
        }
        rig.steps(100);
        host.hear(&mut rig);
        assert!(rig.server.list().iter().all(|device| !device.serving));
        assert!(rig.pending() > 0 && rig.answers.is_empty());
        // It is back, under another key.
        disk.forget();
        disk.shutting = false;
        disk.export.key = DiskKey(8);
        rig.disks.0.push(disk);
        rig.server.rebind(&mut rig.io, &mut rig.disks);
        rig.turn();
        host.end(&mut rig, 0);
        assert!(rig.free());
    }
}

#[test]
fn another_disk_by_the_same_name_is_not_taken_for_it() {
    let mut rig = Rig::new(7);
    rig.disks.0.remove(0);
    let write = rig.write(0, &[1; 512]);
    rig.steps(50);
    rig.disks.0.push(MemDisk::new(8, "disk", SIZE as usize / 2));
    rig.server.rebind(&mut rig.io, &mut rig.disks);
    rig.steps(50);
    assert!(rig.answers.is_empty() && !rig.server.list()[0].serving);
    rig.disks.0[0] = MemDisk::new(9, "disk", SIZE as usize);
    rig.server.rebind(&mut rig.io, &mut rig.disks);
    rig.turn();
    assert_eq!(rig.result(write), 512);
}

#[test]
fn many_devices_share_and_none_starves() {
    let disks = (0..40).map(|n| MemDisk::new(n, &format!("disk{n}"), 2 << 20)).collect();
    let few = vec![Class { capacity: 32 * 1024, count: 12 }, Class { capacity: 80 * 1024, count: 4 }];
    let mut rig = Rig::with(8, disks, few);
    let mut hosts: Vec<Host> = (0..40).map(|_| Host::new(16)).collect();
    for n in 0..600u64 {
        let device = (n % 40) as usize;
        hosts[device].ask(&mut rig, device, n);
        rig.steps(1);
        hosts[device].hear(&mut rig);
    }
    for (device, host) in hosts.into_iter().enumerate() {
        host.end(&mut rig, device);
    }
    assert_eq!(rig.server.status().len(), 40);
    assert!(rig.free());
}

#[test]
fn a_device_that_is_retired_fails_what_waits_and_is_closed_when_the_kernel_has_ended_it() {
    let mut rig = Rig::new(9);
    rig.disks.0.remove(0);
    let waits = rig.write(0, &[1; 512]);
    rig.steps(50);
    let id = rig.ids[0];
    rig.server.retire(&mut rig.io, id);
    assert_eq!(rig.result(waits), -5);
    let late = rig.write(0, &[1; 512]);
    assert_eq!(rig.result(late), -5);
    assert!(!rig.server.is_gone(id));
    rig.world.ublk_stop(rig.devices[0]);
    rig.steps(100);
    assert!(rig.server.is_gone(id) && !rig.world.ublk_served(rig.devices[0]));
}

#[test]
fn a_device_that_somebody_else_ends_while_it_is_busy_is_let_go() {
    let mut rig = Rig::new(10);
    rig.disks.0[0].late = true;
    for n in 0..8 {
        rig.write(n * 4096, &[1; 4096]);
    }
    rig.steps(6);
    rig.world.ublk_stop(rig.devices[0]);
    for _ in 0..10_000 {
        if rig.server.is_gone(rig.ids[0]) {
            break;
        }
        rig.step();
    }
    assert!(rig.server.is_gone(rig.ids[0]) && rig.free());
}

/// A view that is given up: whatever of its requests was where, copied, asked or waiting, ends, and what comes fails; nothing waits for a disk that will not come back, so that the kernel can end the device.
#[test]
fn a_disk_that_will_not_come_back_leaves_nothing_waiting() {
    for at in 0..60 {
        let mut rig = Rig::new(5000 + at);
        rig.disks.0[0].late = at % 3 != 0;
        let mut asked = Vec::new();
        for n in 0..24 {
            asked.push(match n % 3 {
                0 => rig.read(n * 4096, 4096),
                1 => rig.write(n * 4096, &[1; 4096]),
                _ => rig.ask(0, u32::from(op::FLUSH), 0, Vec::new(), 0),
            });
        }
        rig.steps(at as usize);
        // The one or the other is heard of first.
        let (id, mut gone) = (rig.ids[0], rig.disks.0.remove(0));
        if at % 2 == 0 {
            rig.server.close_export(&mut rig.io, gone.export.key);
            rig.steps(at as usize % 7);
        }
        rig.server.retire(&mut rig.io, id);
        rig.turn();
        let late = rig.read(0, 512);
        assert_eq!(rig.result(late), -5);
        for (n, request) in asked.into_iter().enumerate() {
            // What the disk had done, it had done: the host may hear of that.
            let result = rig.result(request);
            let done = n % 3 != 1 || gone.data[n * 4096..][..4096] == [1; 4096];
            assert!(result == -5 || result >= 0 && done, "{at}: {request}: {result}");
        }
        gone.forget();
        assert!(rig.free() && rig.pending() == 0);
        rig.world.ublk_stop(rig.devices[0]);
        rig.steps(100);
        assert!(rig.server.is_gone(id) && !rig.world.ublk_served(rig.devices[0]));
    }
}

#[test]
fn a_disk_that_has_grown_is_served_to_its_new_end() {
    let mut rig = Rig::new(11);
    let (id, behind) = (rig.ids[0], SIZE);
    rig.disks.0[0].data.resize(SIZE as usize + 8192, 0);
    rig.disks.0[0].written.resize(SIZE as usize / 4096 + 2, false);
    rig.disks.0[0].export.geometry.size = SIZE + 8192;
    // Hosts have not heard of it.
    let early = rig.write(behind, &[7; 4096]);
    assert_eq!(rig.result(early), -5);
    rig.server.resize(id, SIZE + 8192);
    let write = rig.write(behind, &[7; 8192]);
    assert_eq!(rig.result(write), 8192);
    let read = rig.read(behind - 512, 1024);
    assert_eq!(rig.answer(read).data, [[0; 512], [7; 512]].concat());
    let past = rig.read(behind + 8192, 512);
    assert_eq!(rig.result(past), -5);
    // A disk that comes back as small as it was is not the one that hosts know now.
    rig.disks.0[0].export.geometry.size = SIZE;
    let mut disk = rig.disks.0.remove(0);
    rig.server.close_export(&mut rig.io, DiskKey(7));
    disk.export.key = DiskKey(8);
    rig.disks.0.push(disk);
    rig.server.rebind(&mut rig.io, &mut rig.disks);
    assert!(!rig.server.list()[0].serving);
}
