//! A target that receives from a source which holds the right keys and means ill, or has gone mad: forged frames of any
//! records, hellos of any content, kills and power losses between. The target ends the connection, names damage or
//! refuses; it does not panic, neither then nor when it is started again over what it has kept.

use afterimage_dataplane::target::{Choice, TargetEvent};
use afterimage_wire::handshake::{Handshake, Hello, Welcome};
use afterimage_wire::ids::{DiskId, IncarnationId};
use afterimage_wire::record::{Cut, DiskInfo, Record, RecordKind, SyncMark};
use afterimage_wire::segment::Predecessor;

use crate::forge::{self, Head};
use crate::input::Input;
use crate::journal::rig::{Dice, Feeder, Model, Rig, SIZE, disk, policy, scribble, stream_id, view_config};

const MS: u64 = 1_000_000;
/// Steps of one input.
const MOST: usize = 40;

struct Attack {
    rig: Rig,
    feeder: Feeder,
    /// Number of the frame that the target expects next, as far as the attacker knows, and of its first record.
    next: (u64, u64),
    connected: bool,
}

/// The body.
pub fn body(data: &[u8]) {
    let mut input = Input::new(data);
    let mut feeder = Feeder::new(1, 1, Predecessor::default());
    feeder.join_and_sync(1);
    scribble(&mut feeder, &mut Model::default(), &mut Dice(u64::from(input.byte())), 10);
    feeder.seal(12);
    let mut attack = Attack { rig: Rig::plain(1), feeder, next: (1, 1), connected: false };
    for _ in 0..MOST {
        if input.is_empty() {
            break;
        }
        attack.step(&mut input);
    }
    attack.end();
}

impl Attack {
    fn step(&mut self, input: &mut Input<'_>) {
        if !self.connected || self.rig.broken {
            self.connect(input);
            return;
        }
        match input.below(16) {
            0 => {
                let frames: Vec<Vec<u8>> = self.feeder.frames.iter().map(|(bytes, _)| bytes.clone()).collect();
                for bytes in frames {
                    self.send(bytes);
                }
                self.next = (self.feeder.frames.len() as u64 + 1, self.feeder.next_seq);
            }
            1 => {
                let number = input.below(self.feeder.frames.len() as u64) as usize;
                let mut bytes = self.feeder.frames[number].0.clone();
                forge::spoil(&mut bytes, input);
                self.send(bytes);
            }
            2 => self.send(input.take(200).to_vec()),
            3 => {
                let plain = input.take(600).to_vec();
                self.forge(input, &[plain], 1);
            }
            4 => self.rig.run_for(input.below(3000) * MS),
            5 => {
                self.rig.die(input.flag());
                self.connected = false;
                self.open();
            }
            6 => self.look(input),
            7 => self.connect(input),
            _ => self.records(input),
        }
        self.rig.run_for(MS);
    }

    fn send(&mut self, bytes: Vec<u8>) {
        if !bytes.is_empty() {
            self.rig.send(bytes);
        }
    }

    fn open(&mut self) -> bool {
        let config = crate::journal::rig::stream_config(self.rig.retention);
        if self.rig.target.open_stream(&mut self.rig.io, config).is_err() {
            return false;
        }
        self.rig.run_for(50 * MS);
        self.rig.events.contains(&TargetEvent::Ready { stream: stream_id() })
    }

    fn connect(&mut self, input: &mut Input<'_>) {
        let mut hello = self.feeder.hello();
        if input.byte() > 200 {
            hostile_hello(&mut hello, input);
            if hello.incarnation != self.feeder.incarnation {
                // It has the policy's key: a new life with a key of its own.
                hello.key = policy().wrap(hello.incarnation, &self.feeder.key, [9; 12]);
            }
        }
        // As it comes off the wire.
        let Ok(Some((Handshake::Hello(hello), _))) = Handshake::read(&Handshake::Hello(hello).encode()) else { return };
        if let Welcome::Accepted { position, .. } = self.rig.hello(&hello) {
            self.rig.attach(&hello);
            self.connected = true;
            self.feeder.incarnation = hello.incarnation;
            self.feeder.wrapped = hello.key;
            self.next = if position.incarnation == hello.incarnation {
                (position.frame + 1, position.seq + 1)
            } else {
                (1, hello.first_seq)
            };
        }
        self.rig.run_for(MS);
    }

    /// A frame of forged chunks, mostly the one that comes next.
    fn forge(&mut self, input: &mut Input<'_>, chunks: &[Vec<u8>], records: u64) {
        let exact = input.byte() < 220;
        let first = if exact { self.next.1 } else { input.number(self.next.1) };
        let head = Head {
            stream: stream_id(),
            incarnation: self.feeder.incarnation,
            number: if exact { self.next.0 } else { input.number(self.next.0) },
            acked: if exact { self.next.0.saturating_sub(1) } else { input.number(self.next.0) },
            seqs: (first, if exact { first.wrapping_add(records).wrapping_sub(1) } else { input.number(first) }),
            mono_ns: input.number(self.feeder.mono),
        };
        let bytes = forge::frame([1; 32], &head, chunks);
        self.send(bytes);
        if exact {
            self.next = (self.next.0.wrapping_add(1), self.next.1.wrapping_add(records));
        }
    }

    /// A frame of records that are almost right.
    fn records(&mut self, input: &mut Input<'_>) {
        let mut payload = Vec::new();
        let mut records = Vec::new();
        for number in 0..1 + input.below(6) {
            let kind = RecordKind::from_u8(1 + input.below(14) as u8).expect("1 to 14 are kinds");
            let slot = if input.byte() < 230 { input.below(3) as u16 } else { input.short() };
            let tame = input.byte() < 200;
            let offset = if tame { input.below(SIZE / 512) * 512 } else { input.number(SIZE) };
            let len = if tame { 512 * (1 + input.below(16)) } else { input.number(4096) & 0xffff_ffff };
            let body = payload_of(kind, slot, len, input);
            let seq = self.next.1.wrapping_add(number);
            let mut record = Record {
                seq: if input.byte() < 240 { seq } else { input.number(seq) },
                kind,
                disk: slot,
                offset,
                len: len as u32,
                mono_ns: input.number(self.feeder.mono + 10 * MS * number),
                wall_ns: input.number(1_700_000_000_000_000_000),
                payload_at: payload.len() as u32,
                payload_len: body.len() as u32,
                crc: crc32c::crc32c(&body),
            };
            if input.byte() > 240 {
                record.payload_at = input.number(payload.len() as u64) as u32;
                record.payload_len = input.number(body.len() as u64) as u32;
            }
            payload.extend(body);
            records.push(record);
        }
        let count = records.len() as u64;
        let mut plain = forge::chunk(&records, &payload);
        if input.byte() > 240 {
            // Says that it is compressed.
            plain[2] = 1;
        }
        self.forge(input, &[plain], count);
    }

    /// Points, resolving, views.
    fn look(&mut self, input: &mut Input<'_>) {
        let from = input.number(self.next.1);
        let _ =
            self.rig.target.points(&mut self.rig.io, stream_id(), from, 1 + input.below(200) as usize, input.flag());
        let choice = match input.below(4) {
            0 => Choice::Latest,
            1 => Choice::Cut(input.number(3)),
            2 => Choice::Time(input.number(1_700_000_000_000_000_000)),
            _ => Choice::Seq(input.number(self.next.1)),
        };
        let Ok(point) = self.rig.target.resolve(&mut self.rig.io, stream_id(), choice) else { return };
        let config = view_config("look", point.seq, input.flag());
        if let Ok(exports) = self.rig.target.open_view(&mut self.rig.io, config) {
            for export in &exports {
                let size = export.geometry.size;
                let offset = input.below(SIZE).min(size.saturating_sub(1));
                let len = (1 + input.below(100_000)).min(size - offset) as usize;
                if len > 0 {
                    self.rig.ask(export.key, afterimage_dataplane::host::Request::Read { offset, len });
                }
            }
            self.rig.run_for(20 * MS);
            let _ = self.rig.target.close_view(&mut self.rig.io, "look", input.flag());
            self.rig.run_for(20 * MS);
        }
    }

    /// Started again over what it has kept: the state is told, a good source gets an answer, what is offered is read.
    fn end(mut self) {
        self.rig.run_for(2000 * MS);
        let _ = self.rig.target.status();
        self.rig.die(false);
        self.connected = false;
        // Whatever a source has said, its target is not locked out of its own files.
        assert!(self.open(), "the stream cannot be opened again: {:?}", self.rig.target.status());
        let hello = self.feeder.hello();
        let _ = self.rig.hello(&hello);
        let mut none = Input::new(&[]);
        self.look(&mut none);
        self.rig.run_for(2000 * MS);
    }
}

fn payload_of(kind: RecordKind, slot: u16, len: u64, input: &mut Input<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    if input.byte() > 230 {
        return input.take(80).to_vec();
    }
    match kind {
        RecordKind::Write | RecordKind::SyncWrite => out.resize(len.min(200_000) as usize, input.byte()),
        RecordKind::Cut => {
            let label = if input.flag() { String::new() } else { "label".into() };
            Cut { number: input.number(1), clock_synced: input.flag(), flush_clean: input.flag(), label }
                .encode(&mut out);
        }
        RecordKind::Join | RecordKind::Resize => hostile_disk(slot, input).encode(&mut out),
        RecordKind::SyncBegin | RecordKind::SyncEnd => {
            SyncMark { sync: input.number(1), whole: input.flag() }.encode(&mut out);
        }
        RecordKind::SyncHash => out.resize(32 * (1 + input.below(4)) as usize, 7),
        _ => {}
    }
    out
}

fn hostile_disk(slot: u16, input: &mut Input<'_>) -> DiskInfo {
    let mut info = disk(slot % 8);
    if input.flag() {
        info.slot = slot;
        info.id = DiskId(input.id());
        info.block = 512 << (input.byte() % 9);
        info.physical_block = 512 << (input.byte() % 9);
        info.size = input.number(SIZE) / u64::from(info.block) * u64::from(info.block);
    }
    info
}

fn hostile_hello(hello: &mut Hello, input: &mut Input<'_>) {
    match input.below(8) {
        0 => hello.first_seq = input.number(hello.first_seq),
        1 => hello.next_frame = input.number(hello.next_frame),
        2 => hello.incarnation = IncarnationId(input.id()),
        3 => hello.predecessor.incarnation = IncarnationId(input.id()),
        4 => {
            hello.predecessor.frame = input.number(1);
            hello.predecessor.seq = input.number(1);
        }
        5 => hello.disks.iter_mut().for_each(|claim| claim.generation = input.number(claim.generation)),
        6 => {
            let slot = input.short();
            hello.disks[0].disk = hostile_disk(slot, input);
        }
        _ => hello.connection = input.short(),
    }
}
