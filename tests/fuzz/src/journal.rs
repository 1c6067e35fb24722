//! A target that finds its files changed: segments, tables, state and images cut short, overwritten, doubled, renamed,
//! removed, with checksums wrong or right. It names damage or refuses the stream; it does not panic, and what it still
//! offers can be read.

use std::cell::OnceCell;

use afterimage_dataplane::host::Request;
use afterimage_dataplane::io::Io;
use afterimage_dataplane::io::sim::WorldConfig;
use afterimage_dataplane::target::{Choice, TargetEvent};
use afterimage_wire::handshake::Welcome;
use afterimage_wire::segment::Predecessor;

use crate::forge::{mend_all, spoil};
use crate::input::Input;

#[path = "../../../dataplane/tests/target_rig/mod.rs"]
pub(crate) mod rig;

use rig::{Dice, Feeder, Model, ROOT, Rig, SECOND, SIZE, config, scribble, stream_config, stream_id, view_config};

const MS: u64 = 1_000_000;

/// Files of a target, by path.
type Files = Vec<(String, Vec<u8>)>;

thread_local! {
    static BASE: OnceCell<Vec<Files>> = const { OnceCell::new() };
}

fn new_rig(retention: u64) -> Rig {
    Rig::new(1, WorldConfig::default(), config(), retention)
}

/// Two lives of a source, segments of both, and a failover that has written.
fn history() -> (Rig, Feeder) {
    let mut rig = new_rig(3600 * SECOND);
    let (mut model, mut dice) = (Model::default(), Dice(1));
    let mut first = Feeder::new(1, 1, Predecessor::default());
    first.join_and_sync(1);
    scribble(&mut first, &mut model, &mut dice, 20);
    first.cut(1);
    first.seal(6);
    rig.ship(&mut first);
    rig.restart(false);
    let (frame, seq) = first.acked;
    let mut second = Feeder::new(2, first.next_seq, Predecessor { incarnation: first.incarnation, frame, seq });
    second.mono = first.mono;
    for number in 2..4 {
        scribble(&mut second, &mut model, &mut dice, 15);
        second.cut(number);
        second.seal(5);
        rig.ship(&mut second);
    }
    let exports = rig.view("fail", seq, true);
    rig.write(exports[0].key, 4096, &[7; 8192], true);
    rig.write(exports[1].key, 512, &[8; 512], true);
    (rig, second)
}

fn files(rig: &Rig) -> Files {
    let file = |path: String| {
        let mut bytes = rig.world.file(rig.node, &path)?;
        if path.ends_with(".seg") {
            // Prepared room is not needed to be found again, and costs time.
            let end = bytes.iter().rposition(|b| *b != 0).map_or(4096, |last| last + 1);
            bytes.truncate(end.next_multiple_of(4096).max(4096));
        }
        Some((path, bytes))
    };
    rig.world.paths(rig.node, ROOT).into_iter().filter_map(file).collect()
}

/// What a target has on disk: in good order, or with damage that it has found and noted.
fn base(damaged: bool) -> Files {
    BASE.with(|bases| {
        let bases = bases.get_or_init(|| {
            let (mut rig, _) = history();
            let good = files(&rig);
            let longest = good.iter().filter(|(path, _)| path.ends_with(".seg")).max_by_key(|(_, bytes)| bytes.len());
            let (path, bytes) = longest.expect("there are segments");
            for at in [bytes.len() / 3, bytes.len() / 2] {
                rig.world.rot(rig.node, path, at as u64, 40);
            }
            // Whoever reads it finds it.
            let point = rig.target.resolve(&mut rig.io, stream_id(), Choice::Latest).expect("there is a point");
            for export in rig.view("find", point.seq, false) {
                for offset in [0, SIZE / 2] {
                    rig.ask(export.key, Request::Read { offset, len: SIZE as usize / 2 });
                }
            }
            rig.run_for(SECOND);
            let damaged = files(&rig);
            assert!(damaged.iter().any(|(path, _)| path.ends_with("/damage")), "the damage is noted");
            vec![good, damaged]
        });
        bases[usize::from(damaged)].clone()
    })
}

/// The second life of [`history`], as its source goes on.
fn goes_on() -> Feeder {
    let mut feeder = Feeder::new(2, 1, Predecessor::default());
    feeder.mono = 3 * SECOND;
    feeder
}

/// The body.
pub fn body(data: &[u8]) {
    let mut input = Input::new(data);
    let retention = if input.flag() { 3600 * SECOND } else { MS };
    let mut files = base(input.flag());
    for _ in 0..1 + input.below(3) {
        change(&mut files, &mut input);
    }
    let mut rig = new_rig(retention);
    rig.die(false);
    for path in rig.world.paths(rig.node, ROOT) {
        let _ = rig.io.remove(&path);
    }
    for (path, bytes) in &files {
        rig.world.put_file(rig.node, path, bytes);
    }
    if open(&mut rig) {
        use_it(&mut rig, &mut input);
        rig.die(input.flag());
        if open(&mut rig) {
            use_it(&mut rig, &mut input);
        }
    }
    let _ = rig.target.status();
}

fn change(files: &mut Files, input: &mut Input<'_>) {
    let tables: Vec<usize> = (0..files.len()).filter(|at| !files[*at].0.ends_with(".img")).collect();
    let at = if input.byte() < 230 && !tables.is_empty() {
        tables[input.below(tables.len() as u64) as usize]
    } else {
        input.below(files.len() as u64) as usize
    };
    let Some((path, bytes)) = files.get_mut(at) else { return };
    match input.below(12) {
        0 => drop(files.remove(at)),
        1 => {
            // Under another number, or another name altogether.
            let Some((folder, name)) = path.rsplit_once('/') else { return };
            let stem = name.rsplit_once('-').map_or(name, |(stem, _)| stem);
            let number = input.number(1);
            let name = match input.below(4) {
                0 => format!("{stem}-{number:016x}.seg"),
                1 => format!("{stem}-{number:x}.seg"),
                2 => format!("{name}.new"),
                _ => "nonsense".into(),
            };
            let path = format!("{folder}/{name}");
            let bytes = bytes.clone();
            if input.flag() {
                files.remove(at);
            }
            files.push((path, bytes));
        }
        2 => bytes.clear(),
        3 => {
            *bytes = input.take(400).to_vec();
            bytes.resize(bytes.len().next_multiple_of(512), 0);
            mend_all(bytes);
        }
        4 => {
            let other = input.below(files.len() as u64) as usize;
            files[at].1 = files[other].1.clone();
        }
        _ => spoil(bytes, input),
    }
}

fn open(rig: &mut Rig) -> bool {
    if rig.target.open_stream(&mut rig.io, stream_config(rig.retention)).is_err() {
        return false;
    }
    rig.run_for(200 * MS);
    rig.events.contains(&TargetEvent::Ready { stream: stream_id() })
}

fn use_it(rig: &mut Rig, input: &mut Input<'_>) {
    let _ = rig.target.status();
    let _ = rig.target.points(&mut rig.io, stream_id(), 0, 1000, false);
    let newest = rig.target.resolve(&mut rig.io, stream_id(), Choice::Latest).map_or(40, |point| point.seq);
    for seq in [newest, input.below(80), input.number(newest)] {
        let Ok(point) = rig.target.resolve(&mut rig.io, stream_id(), Choice::Seq(seq)) else { continue };
        let config = view_config("look", point.seq, input.flag());
        let Ok(exports) = rig.target.open_view(&mut rig.io, config) else { continue };
        for export in &exports {
            let size = export.geometry.size;
            for offset in [0, SIZE / 2] {
                let len = size.saturating_sub(offset).min(SIZE / 2) as usize;
                if len > 0 {
                    rig.ask(export.key, Request::Read { offset, len });
                }
            }
        }
        rig.run_for(30 * MS);
        let _ = rig.target.close_view(&mut rig.io, "look", false);
    }
    let mut feeder = goes_on();
    let hello = feeder.hello();
    if let Welcome::Accepted { position, .. } = rig.hello(&hello) {
        rig.attach(&hello);
        // What comes next, if it is still the same life.
        if position.incarnation == feeder.incarnation && position.frame < 1000 && position.seq < 1 << 40 {
            feeder.next_seq = position.seq + 1;
            feeder.frames = vec![(Vec::new(), position.seq); position.frame as usize];
            scribble(&mut feeder, &mut Model::default(), &mut Dice(5), 8);
            feeder.seal(4);
            rig.send_from(&feeder, position.frame);
        }
        rig.run_for(100 * MS);
    }
    rig.run_for(3000 * MS);
}
