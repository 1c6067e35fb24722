//! Bytes of an NBD client, through a server with a disk that asserts what it is asked. Whatever one client sends, the
//! next one is served, and no buffer is lost.

use afterimage_dataplane::host::FrontEnd as _;
use afterimage_dataplane::io::Class;
use afterimage_dataplane::nbd::Limits;
use afterimage_dataplane::nbd::proto::{RequestHeader, cmd, option};

use crate::input::Input;

#[allow(dead_code)]
#[path = "../../../dataplane/tests/nbd/bed.rs"]
mod bed;

use bed::{Bed, MemDisk, go, meta, option_bytes, pattern};

const DISK: u64 = 1 << 20;
const MS: u64 = 1_000_000;
/// Most bytes of the input that are looked at: a client that sends more only repeats itself.
const MOST: usize = 64 * 1024;

fn new_bed() -> Bed {
    let class = |capacity, count| Class { capacity, count };
    let classes = vec![class(12 << 10, 128), class(32 << 10, 64), class(80 << 10, 16), class(532 << 10, 16)];
    Bed::with(1, Limits::default(), classes, vec![MemDisk::new(7, "disk", DISK as usize)])
}

/// Sends bytes in pieces, with pauses.
fn send(bed: &mut Bed, client: usize, bytes: &[u8], cut: u8) {
    let size = match cut % 4 {
        0 => bytes.len(),
        1 => 1 + usize::from(cut),
        2 => 1 + usize::from(cut) * 64,
        _ => bytes.len() / 2 + 1,
    };
    for piece in bytes.chunks(size.max(bytes.len() / 64).max(1)) {
        bed.send(client, piece);
        if cut & 0x40 != 0 {
            bed.settle(MS);
        }
    }
}

/// A client of good will is served, and nothing is left behind of either.
fn all_is_well(mut bed: Bed, hostile: usize) {
    bed.settle(100 * MS);
    bed.hang_up(hostile);
    let client = bed.serving(true);
    let data = pattern(3, 4096);
    bed.write(client, 0, 1, 8192, &data);
    assert_eq!(bed.error(client), 0);
    assert_eq!(bed.read(client, 0, 8192, 4096), Ok(data));
    bed.hang_up(client);
    bed.settle(5000 * MS);
    assert!(bed.server.is_idle(), "a connection is left");
    assert_eq!(bed.server_io_free(), bed.server_io_total(), "a buffer was lost");
}

/// From the greeting on.
pub fn options(data: &[u8]) {
    let mut input = Input::new(&data[..data.len().min(MOST)]);
    let mut bed = new_bed();
    let client = bed.connect();
    let cut = input.byte();
    let flags = match input.byte() {
        0..=199 => 3,
        200..=220 => 1,
        other => u32::from(other) << 24 | u32::from(other),
    };
    send(&mut bed, client, &flags.to_be_bytes(), cut);
    while !input.is_empty() {
        let names = ["disk", "", "dis", "disk\0", "\u{e9}disk", "other"];
        let bytes = match input.below(8) {
            0 => input.rest().to_vec(),
            1 => {
                let (number, len) = (u32::from(input.byte()), input.number(16) as u32);
                let mut bytes = option_bytes(number, input.take(40));
                bytes[12..16].copy_from_slice(&len.to_be_bytes());
                bytes
            }
            2 => {
                let number = input.number(u64::from(option::GO)) as u32;
                let len = usize::from(input.short());
                option_bytes(number, &vec![input.byte(); len])
            }
            3 => {
                let number = if input.flag() { option::GO } else { option::INFO };
                let infos: Vec<u16> = (0..input.below(20)).map(|_| input.number(3) as u16).collect();
                let mut data = go(names[input.below(6) as usize], &infos);
                if input.byte() > 200 {
                    spoil(&mut data, &mut input);
                }
                option_bytes(number, &data)
            }
            4 => {
                let number = if input.flag() { option::SET_META_CONTEXT } else { option::LIST_META_CONTEXT };
                let queries = ["base:allocation", "base:", "", "base:x", "qemu:dirty", ":", "base"];
                let asked: Vec<&str> = (0..input.below(40)).map(|_| queries[input.below(7) as usize]).collect();
                let mut data = meta(names[input.below(6) as usize], &asked);
                if input.byte() > 200 {
                    spoil(&mut data, &mut input);
                }
                option_bytes(number, &data)
            }
            5 => option_bytes(option::EXPORT_NAME, input.take(8)),
            _ => option_bytes(u32::from(input.byte() % 14), input.take(24)),
        };
        send(&mut bed, client, &bytes, cut);
    }
    all_is_well(bed, client);
}

fn spoil(bytes: &mut [u8], input: &mut Input<'_>) {
    for _ in 0..=input.below(3) {
        let at = input.below(bytes.len() as u64) as usize;
        bytes[at] = input.byte();
    }
}

/// In transmission.
pub fn requests(data: &[u8]) {
    let mut input = Input::new(&data[..data.len().min(MOST)]);
    let mut bed = new_bed();
    let structured = input.flag();
    let client = bed.serving(structured);
    bed.disk().late = input.flag();
    let cut = input.byte();
    let mut cookie = 0;
    // No input asks for more than this in writes, reads and requests: what bounds the time bounds no fault.
    let (mut budget, mut count) = (4u64 << 20, 0);
    while !input.is_empty() && count < 400 {
        count += 1;
        cookie += 1;
        let mut header = RequestHeader { flags: 0, kind: cmd::READ, cookie, offset: 0, len: 0 };
        header.kind = match input.byte() {
            kind @ 0..=239 => u16::from(kind) % 9,
            _ => input.short(),
        };
        header.flags = if input.flag() { 0 } else { input.short() };
        if input.byte() < 200 {
            header.offset = input.below(DISK);
            header.len = input.below(70_000) as u32;
        } else {
            header.offset = input.number(DISK);
            header.len = input.number(DISK) as u32;
        }
        let mut bytes = header.bytes().to_vec();
        match header.kind {
            cmd::WRITE => {
                let len = u64::from(header.len).min(256 << 10).min(budget);
                budget -= len;
                bytes.resize(bytes.len() + len as usize, input.byte());
            }
            cmd::READ => {
                let len = u64::from(header.len);
                if len > budget && len <= DISK {
                    continue;
                }
                budget = budget.saturating_sub(len);
            }
            _ => {}
        }
        match input.byte() {
            250.. => bytes = input.rest().to_vec(),
            240..=249 => spoil(&mut bytes, &mut input),
            238..=239 => bytes.truncate(20),
            _ => {}
        }
        if !bytes.is_empty() {
            send(&mut bed, client, &bytes, cut);
        }
        if input.byte() > 240 {
            bed.clients[client].deaf = !bed.clients[client].deaf;
        }
    }
    all_is_well(bed, client);
}
