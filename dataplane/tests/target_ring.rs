//! The target on the real ring: what is acknowledged is read back by a second life; `--nocapture` shows how fast it was.

mod target_rig;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use afterimage_dataplane::host::{Disks, HostDisk, Request};
use afterimage_dataplane::io::ring::{Ring, RingConfig};
use afterimage_dataplane::io::{Class, Done, Io, Pool};
use afterimage_dataplane::seal::ControlKey;
use afterimage_dataplane::target::{Choice, Target, TargetConfig, TargetEvent};
use afterimage_wire::control::{CONTROL_LEN, Control};
use afterimage_wire::handshake::Welcome;
use afterimage_wire::segment::Predecessor;
use target_rig::{Dice, Feeder, Model, SECOND, SIZE, policy, scribble, stream_config, stream_id, view_config};

struct Life {
    ring: Ring,
    target: Target<Ring>,
}

impl Life {
    fn new(root: &str, segment_bytes: u64) -> Self {
        let classes = [(4096, 256), (16 << 10, 256), (160 << 10, 64), (544 << 10, 32), (4160 << 10, 8)];
        let pool = Pool::new(&classes.map(|(capacity, count)| Class { capacity, count }));
        let ring = Ring::new(pool, RingConfig::default()).expect("this kernel has what the ring needs");
        let config = TargetConfig {
            segment_bytes,
            budget_bytes: 16 * segment_bytes,
            reserve_bytes: 0,
            ..TargetConfig::new(root)
        };
        let mut life = Self { ring, target: Target::new(7, config).expect("good settings") };
        life.target.open_stream(&mut life.ring, stream_config(3600 * SECOND)).expect("opens");
        life.until(|target, _| {
            std::iter::from_fn(|| target.next_event()).any(|event| event == TargetEvent::Ready { stream: stream_id() })
        });
        life
    }

    fn until(&mut self, mut condition: impl FnMut(&mut Target<Ring>, &mut Ring) -> bool) {
        let end = Instant::now() + std::time::Duration::from_secs(60);
        let mut done: Vec<Done> = Vec::new();
        self.target.turn(&mut self.ring);
        while !condition(&mut self.target, &mut self.ring) {
            assert!(Instant::now() < end, "it takes too long");
            let soon = self.ring.now() + 50_000_000;
            self.ring.poll(Some(self.target.deadline().map_or(soon, |at| at.min(soon))), &mut done);
            for done in done.drain(..) {
                self.target.done(&mut self.ring, done);
            }
            self.target.turn(&mut self.ring);
        }
    }

    fn attach(&mut self, feeder: &Feeder) -> UnixStream {
        let hello = feeder.hello();
        let welcome = self.target.hello(&mut self.ring, &hello);
        assert!(matches!(welcome, Welcome::Accepted { .. }), "{welcome:?}");
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        let sock = self.ring.attach(OwnedFd::from(ours)).expect("a slot");
        self.target.attach(&mut self.ring, &hello, sock, ControlKey::new(&[3; 32]));
        theirs
    }
}

/// Sends frames, at most `depth` unacknowledged, until all are; returns how long each took, nanoseconds.
fn feed(mut sock: UnixStream, frames: Vec<Vec<u8>>, depth: u64) -> std::thread::JoinHandle<Vec<u64>> {
    std::thread::spawn(move || {
        let mut control = ControlKey::new(&[3; 32]);
        let (mut acked, mut sent) = (0, 0);
        let mut begun = Vec::new();
        let mut took = Vec::new();
        while acked < frames.len() as u64 {
            while sent < frames.len() as u64 && sent - acked < depth {
                begun.push(Instant::now());
                sock.write_all(&frames[sent as usize]).expect("sends");
                sent += 1;
            }
            let mut bytes = [0; CONTROL_LEN];
            sock.read_exact(&mut bytes).expect("hears");
            if let Control::Ack { frame, .. } = control.open(&bytes).expect("sealed") {
                for number in acked..frame {
                    took.push(begun[number as usize].elapsed().as_nanos() as u64);
                }
                acked = frame;
            }
        }
        took
    })
}

fn root() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary folder")
}

#[test]
fn what_is_acknowledged_is_there_in_the_next_life() {
    let dir = root();
    let path = dir.path().display().to_string();
    let mut feeder = Feeder::new(1, 1, Predecessor::default());
    let mut model = Model::default();
    feeder.join_and_sync(1);
    scribble(&mut feeder, &mut model, &mut Dice(1), 200);
    feeder.seal(6);
    let frames: Vec<Vec<u8>> = feeder.frames.iter().map(|frame| frame.0.clone()).collect();
    for _ in 0..2 {
        let mut life = Life::new(&path, 8 << 20);
        if life.target.status()[0].durable_frame == 0 {
            let sock = life.attach(&feeder);
            let thread = feed(sock, frames.clone(), 16);
            life.until(|_, _| thread.is_finished());
            assert_eq!(thread.join().expect("fed").len(), frames.len());
        }
        let latest = life.target.resolve(&mut life.ring, stream_id(), Choice::Latest).expect("a point");
        assert_eq!(latest.seq, feeder.next_seq - 1);
        for seq in (8..feeder.next_seq).step_by(13) {
            let exports = life.target.open_view(&mut life.ring, view_config("v", seq, false)).expect("opens");
            for (slot, export) in exports.iter().enumerate() {
                let read = Request::Read { offset: 0, len: SIZE as usize };
                life.target.disk(export.key).expect("on offer").request(&mut life.ring, 1, read);
                let mut answer = None;
                life.until(|target, _| {
                    answer = target.disk(export.key).expect("on offer").answers().pop_front();
                    answer.is_some()
                });
                let part = answer.expect("there is one").result.expect("reads").expect("has data");
                assert!(part.buf[part.at..part.at + part.len] == model.at(slot as u16, seq), "at {seq}");
            }
            life.target.close_view(&mut life.ring, "v", false).expect("closes");
        }
    }
    let _ = policy();
}

#[test]
fn small_and_large_frames_are_acknowledged() {
    for (what, bytes, count, depth) in
        [("4 KiB, depth 1", 3500, 1500, 1), ("4 KiB, depth 8", 3500, 4000, 8), ("1 MiB, depth 4", 1 << 20, 150, 4)]
    {
        let dir = root();
        let mut life = Life::new(&dir.path().display().to_string(), 16 << 20);
        let mut feeder = Feeder::new(1, 1, Predecessor::default());
        let mut dice = Dice(3);
        for _ in 0..count {
            let offset = dice.roll(SIZE / 4096) * 4096;
            let payload: Vec<u8> = (0..bytes).map(|_| dice.roll(256) as u8).collect();
            feeder.write(0, if bytes > 4096 { 0 } else { offset }, payload);
        }
        feeder.seal(1);
        let frames: Vec<Vec<u8>> = feeder.frames.iter().map(|frame| frame.0.clone()).collect();
        let total: usize = frames.iter().map(Vec::len).sum();
        let sock = life.attach(&feeder);
        let begin = Instant::now();
        let thread = feed(sock, frames, depth);
        life.until(|_, _| thread.is_finished());
        let mut took = thread.join().expect("fed");
        let seconds = begin.elapsed().as_secs_f64();
        took.sort_unstable();
        println!(
            "{what}: {:.0} frames/s, {:.0} MB/s, p50 {} us, p99 {} us",
            took.len() as f64 / seconds,
            total as f64 / 1e6 / seconds,
            took[took.len() / 2] / 1000,
            took[took.len() * 99 / 100] / 1000
        );
        let status = life.target.status();
        assert_eq!(status[0].durable_frame, count as u64);
    }
}
