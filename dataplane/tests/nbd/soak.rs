//! Random requests of several clients against a model of the disk: every reply right, every byte in its place.

use std::collections::HashMap;

use super::bed::{Bed, Message, pattern};
use afterimage_dataplane::io::sim::Rng;
use afterimage_dataplane::nbd::proto::{be32, be64, chunk, cmd, cmd_flag};

const SIZE: u64 = 8 << 20;

/// What a client waits for.
enum Expected {
    /// Success without data.
    Nothing,
    /// These bytes at this offset.
    Data { offset: u64, data: Vec<u8>, missing: usize },
}

/// A free range of the disk, near to what clients do: mostly small and aligned, now and then neither.
fn range(rng: &mut Rng, taken: &[(u64, u64)]) -> Option<(u64, u32)> {
    let len = match rng.below(10) {
        0 => {
            let most = if rng.below(3) == 0 { 7 << 20 } else { 1 << 20 };
            1 + rng.below(most)
        }
        1..=3 => 1 + rng.below(20_000),
        _ => 4096,
    };
    let mut offset = rng.below(SIZE - len + 1);
    if rng.below(4) > 0 {
        offset -= offset % 4096;
    }
    let free = taken.iter().all(|&(begin, end)| offset + len <= begin || end <= offset);
    free.then_some((offset, len as u32))
}

fn round(bed: &mut Bed, rng: &mut Rng, model: &mut [u8], clients: &[(usize, bool)]) {
    let mut taken = Vec::new();
    let mut expected: Vec<HashMap<u64, Expected>> = clients.iter().map(|_| HashMap::new()).collect();
    for cookie in 0..rng.below(60) {
        let which = rng.below(clients.len() as u64) as usize;
        let (client, structured) = clients[which];
        let Some((offset, len)) = range(rng, &taken) else { continue };
        taken.push((offset, offset + u64::from(len)));
        let place = offset as usize..offset as usize + len as usize;
        let fua = rng.below(2) as u16 * cmd_flag::FUA;
        let what = match rng.below(8) {
            0..=3 => {
                let data = pattern(rng.below(1 << 40), len as usize);
                bed.write(client, fua, cookie, offset, &data);
                model[place].copy_from_slice(&data);
                Expected::Nothing
            }
            4 | 5 => {
                let df = if structured { rng.below(2) as u16 * cmd_flag::DF } else { 0 };
                bed.request(client, cmd::READ, fua | df, cookie, offset, len);
                Expected::Data { offset, data: model[place].to_vec(), missing: len as usize }
            }
            6 => {
                bed.request(client, cmd::WRITE_ZEROES, fua, cookie, offset, len);
                model[place].fill(0);
                Expected::Nothing
            }
            _ => {
                bed.request(client, cmd::FLUSH, 0, cookie, 0, 0);
                Expected::Nothing
            }
        };
        expected[which].insert(cookie, what);
        if rng.below(4) == 0 {
            bed.settle(rng.below(1_000_000));
        }
    }
    for (which, &(client, _)) in clients.iter().enumerate() {
        while !expected[which].is_empty() {
            let message = bed.message(client);
            let (Message::Simple { cookie, .. } | Message::Chunk { cookie, .. }) = message;
            let what = expected[which].get_mut(&cookie).expect("a reply to nothing");
            let over = match (message, what) {
                (Message::Simple { error: 0, .. }, Expected::Nothing) => true,
                (Message::Simple { error: 0, .. }, Expected::Data { data, .. }) => {
                    assert!(bed.take(client, data.len()) == *data, "wrong data");
                    true
                }
                (
                    Message::Chunk { flags, kind: chunk::OFFSET_DATA, payload, .. },
                    Expected::Data { offset, data, missing },
                ) => {
                    let at = (be64(&payload) - *offset) as usize;
                    assert!(payload[8..] == data[at..at + payload.len() - 8], "wrong data");
                    *missing -= payload.len() - 8;
                    assert_eq!(*missing == 0, flags & chunk::DONE != 0);
                    *missing == 0
                }
                (Message::Chunk { payload, .. }, _) => panic!("error {}", be32(&payload)),
                (other, _) => panic!("{other:?}"),
            };
            if over {
                expected[which].remove(&cookie);
            }
        }
    }
    assert!(bed.disk().data == *model, "the disk differs from the model");
}

#[test]
fn random_requests_against_a_model() {
    for seed in 0..24 {
        println!("seed {seed}");
        let mut bed = Bed::new(seed);
        bed.disk().late = seed % 4 > 0;
        let mut rng = bed.world.rng();
        bed.world.configure(|c| c.net_piece = [64 * 1024, 5000, 100_000][seed as usize % 3]);
        let mut model = vec![0; SIZE as usize];
        let clients: Vec<_> = (0..1 + rng.below(3)).map(|n| (bed.serving(n % 2 == 0), n % 2 == 0)).collect();
        for _ in 0..6 {
            round(&mut bed, &mut rng, &mut model, &clients);
        }
        let counters = bed.server.counters();
        assert!(counters.copied_bytes <= counters.written_bytes, "no byte is copied twice");
        assert_eq!((counters.errors, counters.violations), (0, 0));
    }
}
