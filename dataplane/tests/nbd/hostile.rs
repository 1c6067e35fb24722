//! Bytes that no client of good will sends: errors or the end of that connection, nothing else.

use super::bed::{Bed, go, meta, option_bytes, pattern};
use afterimage_dataplane::host::FrontEnd as _;
use afterimage_dataplane::io::sim::Rng;
use afterimage_dataplane::nbd::proto::{RequestHeader, cmd, option};

const SEEDS: u64 = 60;

/// Sends the bytes cut at random places, with pauses.
fn send_cut(bed: &mut Bed, rng: &mut Rng, client: usize, bytes: &[u8]) {
    let mut left = bytes;
    while !left.is_empty() {
        let len = (1 + rng.below(left.len() as u64 * 2)).min(left.len() as u64) as usize;
        bed.send(client, &left[..len]);
        left = &left[len..];
        if rng.below(2) == 0 {
            bed.settle(rng.below(2_000_000));
        }
    }
}

/// Afterwards a client of good will is served, and nothing is left behind.
fn all_is_well(mut bed: Bed, hostile: usize) {
    bed.settle(100_000_000);
    let client = bed.serving(true);
    let data = pattern(3, 4096);
    bed.write(client, 0, 1, 8192, &data);
    assert_eq!(bed.error(client), 0);
    assert_eq!(bed.read(client, 0, 8192, 4096), Ok(data));
    for client in [hostile, client] {
        bed.hang_up(client);
    }
    bed.settle(5_000_000_000);
    assert!(bed.server.is_idle());
    assert_eq!(bed.server_io_free(), bed.server_io_total(), "a buffer was lost");
}

fn random_bytes(rng: &mut Rng, max: u64) -> Vec<u8> {
    let mut bytes = vec![0; rng.below(max) as usize];
    rng.fill(&mut bytes);
    bytes
}

/// Overwrites a few bytes, mostly in the first 40, where the headers are.
fn spoil(rng: &mut Rng, bytes: &mut [u8]) {
    for _ in 0..=rng.below(3) {
        let within = if rng.below(3) == 0 { bytes.len() } else { bytes.len().min(40) };
        let at = rng.below(within as u64) as usize;
        bytes[at] = [0, 1, 0x7f, 0x80, 0xff, rng.below(256) as u8][rng.below(6) as usize];
    }
}

#[test]
fn noise_instead_of_a_handshake() {
    for seed in 0..SEEDS {
        println!("seed {seed}");
        let mut bed = Bed::new(seed);
        let mut rng = bed.world.rng();
        let client = bed.connect();
        let mut bytes = random_bytes(&mut rng, 3000);
        if seed % 2 == 0 {
            bytes.splice(0..0, 3u32.to_be_bytes());
        }
        send_cut(&mut bed, &mut rng, client, &bytes);
        all_is_well(bed, client);
    }
}

#[test]
fn spoilt_options() {
    for seed in 0..SEEDS {
        println!("seed {seed}");
        let mut bed = Bed::new(seed);
        let mut rng = bed.world.rng();
        let client = bed.connect();
        send_cut(&mut bed, &mut rng, client, &3u32.to_be_bytes());
        for _ in 0..20 {
            let number = rng.below(13) as u32;
            let data = match rng.below(4) {
                0 => go("disk", &[0, 1, 2, 3]),
                1 => meta("disk", &["base:allocation", "base:", "x-other:thing"]),
                2 => random_bytes(&mut rng, 40_000),
                _ => vec![],
            };
            let mut bytes = option_bytes(number, &data);
            if rng.below(2) == 0 && number != option::ABORT {
                spoil(&mut rng, &mut bytes);
            }
            send_cut(&mut bed, &mut rng, client, &bytes);
        }
        all_is_well(bed, client);
    }
}

#[test]
fn noise_instead_of_requests() {
    for seed in 0..SEEDS {
        println!("seed {seed}");
        let mut bed = Bed::new(seed);
        let mut rng = bed.world.rng();
        let client = bed.serving(seed % 2 == 0);
        let bytes = random_bytes(&mut rng, 5000);
        send_cut(&mut bed, &mut rng, client, &bytes);
        all_is_well(bed, client);
    }
}

#[test]
fn spoilt_requests() {
    for seed in 0..SEEDS {
        println!("seed {seed}");
        let mut bed = Bed::new(seed);
        bed.disk().late = seed % 3 == 0;
        let mut rng = bed.world.rng();
        let client = bed.serving(seed % 2 == 0);
        // Some good writes first, so that receives are scattered when the bad ones come.
        let len = 1 + rng.below(9000) as usize;
        for _ in 0..rng.below(12) {
            bed.write(client, 0, 1, 4096, &pattern(1, len));
        }
        for _ in 0..30 {
            let kind = rng.below(9) as u16;
            let header = RequestHeader {
                flags: [0, 0, 1, 4, 8, 31][rng.below(6) as usize],
                kind: if kind == cmd::DISC && rng.below(4) > 0 { cmd::READ } else { kind },
                cookie: rng.below(1 << 40),
                offset: [0, 512, 4095, (8 << 20) - 1, 8 << 20, u64::MAX, rng.below(8 << 20)][rng.below(7) as usize],
                len: [0, 1, 4096, len as u32, 32 << 20, (64 << 20) + 1, u32::MAX][rng.below(7) as usize],
            };
            let mut bytes = header.bytes().to_vec();
            if kind == cmd::WRITE && header.len < 100_000 {
                bytes.extend_from_slice(&pattern(seed, header.len as usize));
            }
            if rng.below(5) == 0 {
                spoil(&mut rng, &mut bytes);
            }
            send_cut(&mut bed, &mut rng, client, &bytes);
        }
        all_is_well(bed, client);
    }
}

#[test]
fn connections_that_break_anywhere() {
    for seed in 0..SEEDS {
        println!("seed {seed}");
        let mut bed = Bed::new(seed);
        bed.disk().late = true;
        let mut rng = bed.world.rng();
        let client = bed.serving(seed % 2 == 0);
        for n in 0..rng.below(20) {
            match rng.below(3) {
                0 => bed.write(client, 0, n, n * 70_000, &pattern(n, 1 + rng.below(70_000) as usize)),
                1 => bed.request(client, cmd::READ, 0, n, rng.below(1 << 20), 1 + rng.below(3 << 20) as u32),
                _ => bed.request(client, cmd::FLUSH, 0, n, 0, 0),
            }
        }
        bed.settle(rng.below(3_000_000));
        if seed % 3 == 0 {
            bed.cut(client);
        } else {
            bed.hang_up(client);
        }
        all_is_well(bed, client);
    }
}
