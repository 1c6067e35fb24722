//! Requests of a kernel, through a ublk device with a disk that asserts what it is asked. Whatever is asked is answered
//! once, what goes well stays on the disk, and the device goes on; over deaths of its process and a disk that goes away.

use afterimage_dataplane::host::{DiskKey, FrontEnd as _};
use afterimage_dataplane::io::ublk::uapi::{Descriptor, SECTOR};
use afterimage_dataplane::io::{Class, Errno};

use crate::input::Input;

#[allow(dead_code)]
#[path = "../../../dataplane/tests/ublk/rig.rs"]
mod rig;

use rig::Rig;
use rig::bed::{MemDisk, pattern};

const DISK: u64 = 1 << 20;
/// Most requests of one input.
const MOST: usize = 200;
/// Longest data that a host really has, sectors.
const LONGEST: u32 = 1024;
const STEPS: usize = 20_000;

fn sector(input: &mut Input<'_>) -> u64 {
    match input.below(5) {
        0 => DISK / SECTOR - input.below(3),
        1 => u64::MAX - input.below(3),
        2 => u64::MAX / SECTOR + input.below(3),
        3 => input.number(DISK / SECTOR),
        _ => input.below(DISK / SECTOR),
    }
}

fn sectors(input: &mut Input<'_>) -> u32 {
    match input.below(5) {
        0 => 0,
        1 => u32::MAX - input.below(2) as u32,
        2 => LONGEST + input.below(2) as u32,
        _ => 1 + input.below(32) as u32,
    }
}

/// Any requests, in any order.
pub fn body(data: &[u8]) {
    let mut input = Input::new(data);
    let class = |capacity, count| Class { capacity, count };
    let classes = match input.below(3) {
        0 => vec![class(16 << 10, 2), class(80 << 10, 1)],
        _ => vec![class(16 << 10, 32), class(80 << 10, 16), class(532 << 10, 8)],
    };
    let mut disk = MemDisk::new(7, "disk", DISK as usize);
    disk.late = input.flag();
    disk.export.geometry.read_only = input.below(5) == 0;
    disk.export.geometry.discard = input.flag();
    let read_only = disk.export.geometry.read_only;
    let mut rig = Rig::with(1, vec![disk], classes);
    let mut asked = Vec::new();
    let mut away = None;
    while !input.is_empty() && asked.len() < MOST {
        match input.below(12) {
            0 => rig.crash(),
            1 => rig.steps(input.below(30) as usize),
            2 if away.is_none() => {
                rig.disks.0[0].shut();
                rig.steps(input.below(10) as usize);
                away = rig.disks.0.pop();
                if input.flag() {
                    let key = away.as_ref().map_or(DiskKey(7), |disk: &MemDisk| disk.export.key);
                    rig.server.close_export(&mut rig.io, key);
                }
            }
            3 => bring_back(&mut rig, away.take()),
            4 if away.is_none() => {
                let from = input.below(DISK);
                rig.disks.0[0].fail = input.flag().then_some((from..from + 4096, Errno::IO));
            }
            _ => {
                let op = if input.flag() { input.below(6) as u32 } else { u32::from(input.byte()) };
                let flags = if input.flag() { 0 } else { input.number(u64::from(u32::MAX >> 8)) as u32 };
                let (start_sector, nr_sectors) = (sector(&mut input), sectors(&mut input));
                let descriptor =
                    Descriptor { op_flags: flags << 8 | op, nr_sectors, start_sector, addr: input.number(9) };
                let bytes = (nr_sectors.min(LONGEST + 1) as usize) * SECTOR as usize;
                asked.push(rig.raw(0, descriptor, pattern(asked.len() as u64, bytes)));
            }
        }
    }
    bring_back(&mut rig, away);
    rig.disks.0[0].fail = None;
    for request in asked {
        let _ = rig.answer(request);
    }
    // It serves on.
    let write = rig.write(8192, &pattern(5, 4096));
    assert_eq!(rig.result(write), if read_only { -1 } else { 4096 });
    let read = rig.read(8192, 4096);
    let answer = rig.answer(read);
    assert_eq!(answer.result, 4096);
    assert!(read_only || answer.data == pattern(5, 4096), "what was written reads otherwise");
    for _ in 0..STEPS {
        if rig.pending() == 0 {
            break;
        }
        rig.step();
    }
    assert!(rig.pending() == 0 && rig.free(), "a request or a buffer was lost");
}

fn bring_back(rig: &mut Rig, away: Option<MemDisk>) {
    if let Some(mut disk) = away {
        disk.forget();
        disk.shutting = false;
        // Another life of it has another key.
        disk.export.key = DiskKey(disk.export.key.0 + 1);
        rig.disks.0.push(disk);
        rig.server.rebind(&mut rig.io, &mut rig.disks);
        rig.turn();
    }
}
