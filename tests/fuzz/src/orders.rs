//! Orders of a coordinator or of a stand-alone file that make no sense: they are refused by field, or done; nobody
//! panics, and what was there before goes on.

use afterimage_dataplane::host::Request;
use afterimage_dataplane::io::Io;
use afterimage_dataplane::target::{Choice, StreamConfig, TargetEvent, ViewConfig};
use afterimage_wire::ids::{DiskId, StreamId};
use afterimage_wire::record::DiskInfo;
use afterimage_wire::segment::Predecessor;
use afterimage_wire::timeline::TimelineKind;

use crate::input::Input;
use crate::journal::rig::{Dice, Feeder, Model, Rig, SIZE, disk, scribble, stream_config, stream_id};
use crate::link::Machine;

const MS: u64 = 1_000_000;

fn name(input: &mut Input<'_>) -> String {
    let names = ["v", "w", "", "a/b", "..", "\u{e9}\0", "v\n"];
    match input.below(9) {
        at @ 0..7 => names[at as usize].into(),
        7 => "x".repeat(input.below(3000) as usize),
        _ => String::from_utf8_lossy(input.take(12)).into_owned(),
    }
}

fn hostile_info(input: &mut Input<'_>) -> DiskInfo {
    let slot = input.below(4) as u16;
    let mut info = disk(slot);
    for _ in 0..input.below(3) {
        match input.below(6) {
            0 => info.slot = input.short(),
            1 => info.id = DiskId(input.id()),
            2 => info.size = input.number(SIZE),
            3 => info.block = input.number(512) as u32,
            4 => info.physical_block = input.number(4096) as u32,
            _ => (info.serial, info.name) = (name(input), name(input)),
        }
    }
    info
}

fn stream_order(input: &mut Input<'_>) -> StreamConfig {
    let mut config = stream_config(input.number(3600 * 1000 * MS));
    if input.byte() > 180 {
        config.stream = StreamId(input.id());
    }
    if input.flag() {
        config.name = name(input);
    }
    if input.flag() {
        config.disks = (0..input.below(5)).map(|_| (hostile_info(input), input.number(1))).collect();
    }
    config
}

fn view_order(input: &mut Input<'_>, newest: u64) -> ViewConfig {
    let disks = input.flag().then(|| (0..input.below(4)).map(|_| DiskId(input.id())).collect());
    let kinds = [TimelineKind::View, TimelineKind::Failover, TimelineKind::Source, TimelineKind::Losing];
    let kind = if input.byte() > 200 { input.below(4) } else { input.below(2) };
    ViewConfig {
        name: name(input),
        stream: if input.byte() > 220 { StreamId(input.id()) } else { stream_id() },
        seq: input.number(newest),
        disks,
        writable: input.flag(),
        kind: kinds[kind as usize],
        reason: name(input),
    }
}

/// The body.
pub fn body(data: &[u8]) {
    let mut input = Input::new(data);
    if input.flag() {
        source_orders(&mut input);
        return;
    }
    let mut rig = Rig::plain(1);
    let (mut model, mut feeder) = (Model::default(), Feeder::new(1, 1, Predecessor::default()));
    feeder.join_and_sync(1);
    scribble(&mut feeder, &mut model, &mut Dice(3), 12);
    feeder.cut(1);
    feeder.seal(7);
    rig.ship(&mut feeder);
    let newest = feeder.next_seq - 1;
    let mut erased = false;
    for _ in 0..30 {
        if input.is_empty() {
            break;
        }
        erased |= target_order(&mut rig, &mut input, newest);
        rig.run_for(5 * MS);
    }
    let _ = rig.target.status();
    rig.die(input.flag());
    let opened = rig.target.open_stream(&mut rig.io, stream_config(3600 * 1000 * MS));
    if erased {
        return;
    }
    assert_eq!(opened, Ok(()), "orders have locked the target out of its own files");
    rig.run_for(200 * MS);
    assert!(rig.events.contains(&TargetEvent::Ready { stream: stream_id() }), "{:?}", rig.target.status());
}

/// True if the stream was erased, by an order that makes sense: what comes after it may be another stream.
fn target_order(rig: &mut Rig, input: &mut Input<'_>, newest: u64) -> bool {
    let Rig { target, io, .. } = rig;
    match input.below(9) {
        0 | 1 => drop(target.open_stream(io, stream_order(input))),
        2..=4 => {
            let Ok(exports) = target.open_view(io, view_order(input, newest)) else { return false };
            for export in exports {
                let size = export.geometry.size;
                if size < 8192 {
                    continue;
                }
                let offset = input.below((size - 4096).min(SIZE)) / 512 * 512;
                let request = match input.below(4) {
                    0 => Request::Read { offset, len: 4096 },
                    1 => Request::Zero { offset, len: 4096, unmap: input.flag(), fast_only: false, fua: input.flag() },
                    2 => Request::Discard { offset, len: 4096, fua: input.flag() },
                    _ => Request::Flush,
                };
                if export.geometry.read_only && !matches!(request, Request::Read { .. } | Request::Flush) {
                    continue;
                }
                rig.ask(export.key, request);
            }
        }
        5 => drop(target.close_view(io, &name(input), input.flag())),
        6 => {
            let disks: Vec<DiskId> = (0..input.below(4)).map(|_| DiskId(input.id())).collect();
            let stream = if input.byte() > 220 { StreamId(input.id()) } else { stream_id() };
            let _ = target.raise_generation(io, stream, &disks, &name(input));
        }
        7 => {
            let _ = target.points(io, stream_id(), input.number(newest), input.below(2000) as usize, input.flag());
            let choice = match input.below(3) {
                0 => Choice::Cut(input.number(1)),
                1 => Choice::Time(input.number(1_700_000_000_000_000_000)),
                _ => Choice::Seq(input.number(newest)),
            };
            let _ = target.resolve(io, stream_id(), choice);
        }
        _ => {
            let stream = if input.byte() > 220 { StreamId(input.id()) } else { stream_id() };
            let erase = input.flag();
            return target.drop_stream(io, stream, erase).is_ok() && erase;
        }
    }
    false
}

/// A source that is told what makes no sense.
fn source_orders(input: &mut Input<'_>) {
    let mut machine = Machine::new();
    let good = Machine::config();
    let mut protected = false;
    for _ in 0..20 {
        if input.is_empty() {
            break;
        }
        let now = machine.io().now();
        match input.below(6) {
            0 | 1 => {
                let mut config = good.clone();
                for _ in 0..input.below(4) {
                    let disk = config.disks.last_mut();
                    match (input.below(12), disk) {
                        (0, _) => config.stream = StreamId(input.id()),
                        (1, _) => config.name = name(input),
                        (2, _) => config.cut_interval = input.number(1000 * MS),
                        (3, _) => config.disks.clear(),
                        (4, Some(disk)) => disk.id = DiskId(input.id()),
                        (5, Some(disk)) => disk.slot = input.short(),
                        (6, Some(disk)) => disk.name = name(input),
                        (7, Some(disk)) => disk.label = name(input),
                        (8, Some(disk)) => disk.path = name(input),
                        (9, Some(disk)) => disk.log_path = name(input),
                        (10, Some(disk)) => (disk.serial, disk.generation) = (name(input), input.number(1)),
                        (_, Some(disk)) => {
                            let twin = disk.clone();
                            config.disks.push(twin);
                        }
                        (_, None) => {}
                    }
                }
                protected |= machine.order(|source, io| source.protect(io, config)).is_ok();
            }
            2 => {
                let hold = input.flag();
                machine.order(|source, io| source.fence(io, good.stream, hold));
                machine.pass(MS);
                machine.order(|source, io| source.fence(io, good.stream, false));
            }
            3 => {
                let label = name(input);
                machine.order(|source, io| source.label_cut(io, good.stream, &label));
            }
            4 => {
                let interval = input.number(1000 * MS);
                let _ = machine.order(|source, io| source.set_policy(io, good.stream, interval, true));
            }
            _ => machine.welcome(),
        }
        let _ = machine.source.status(now);
        machine.pass(10 * MS);
    }
    if !protected {
        assert!(machine.protect(), "a good disk is taken after bad orders");
    }
    machine.pass(20 * MS);
    machine.well();
}
