//! The way home: the replica runs on and is written to, the source's site comes back, and the group fails back to it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use afterimage_wire::v1;

use super::api::Api;
use super::display::{self, Display};
use super::site::Site;
use super::writer::{self, BLOCK, Memory, Places, Progress};
use super::{GROUP, fail, wait_protected};
use crate::nbd_client::Client;

/// Bytes of one read while comparing.
const READ: usize = 4 * 1024 * 1024;
/// Most writes that the replica's writer remembers, each time.
const MAX_WRITES: usize = 400_000;
/// How long the failback may take to be ready.
const READY_WITHIN: Duration = Duration::from_secs(120);

/// What came of it.
pub struct Back {
    /// Bytes sent home of each byte that had to be: blocks that differed when it began, and writes from then on.
    pub bytes_ratio: f64,
    /// From the verb `switch` until the first read at the source.
    pub switch_ms: f64,
    /// Blocks compared between the sites.
    pub blocks_compared: u64,
}

/// The disks of the group at both sites.
pub struct Sides<'a> {
    /// Files of the source's disks.
    pub images: [&'a Path; 2],
    /// Where views are served, and the exports of the one that the group runs from.
    pub views: (&'a Path, &'a [String; 2]),
}

/// A writer on the view, until told to stop.
struct Running {
    progress: Arc<Progress>,
    thread: std::thread::JoinHandle<io::Result<Memory>>,
}

fn begin(views: (&Path, &[String; 2])) -> Running {
    let progress = Arc::new(Progress::default());
    let (socket, exports): (PathBuf, [String; 2]) = (views.0.to_owned(), views.1.clone());
    let thread = {
        let progress = progress.clone();
        std::thread::spawn(move || {
            writer::run(&Places { socket: &socket, data: &exports[0], log: &exports[1] }, &progress, MAX_WRITES)
        })
    };
    Running { progress, thread }
}

impl Running {
    fn writes(&self) -> u64 {
        self.progress.writes.load(Ordering::Relaxed)
    }

    fn end(self) -> io::Result<u64> {
        self.progress.stop.store(true, Ordering::Relaxed);
        let memory = self.thread.join().map_err(|_| io::Error::other("the writer on the replica crashed"))??;
        match memory.ended_by {
            None => Ok(memory.writes.len() as u64),
            Some(why) => fail(format!("the replica's machine has lost its disks during the failback: {why}")),
        }
    }
}

/// Writes at the replica, fails back, compares, commits.
pub async fn play(site: &mut Site, api: &mut Api, sides: &Sides<'_>, display: &Display) -> io::Result<Back> {
    display.headline("8  The machine runs from its replica, and writes");
    let running = begin(sides.views);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let written = running.end()?;
    let mut differing = 0;
    let mut client = views_of(sides)?;
    for (client, image) in client.iter_mut().zip(sides.images) {
        differing += differing_blocks(client, &File::open(image)?)?;
    }
    drop(client);
    display.line(&format!("   {written} writes; {differing} blocks are not what the source's disks hold"));

    display.headline("9  The source's site comes back: fail back, while the machine writes on");
    site.restart_source()?;
    site.wait_connected(api).await?;
    let running = begin(sides.views);
    api.failback(GROUP).await?;
    let reverse = wait_ready(api, display, &running).await?;
    display.line(&format!(
        "   ready to switch after {} bytes sent; protected towards the source, RPO {}",
        reverse.wire_bytes,
        display::ms(reverse.rpo.as_ref().and_then(|rpo| rpo.now_us))
    ));
    let live = running.end()?;
    let kept = views_of(sides)?;
    let held = contents(kept)?;
    let sent = api.reverse(GROUP).await?.wire_bytes;
    let verb = Instant::now();
    let operation = api.switch(GROUP).await?;
    let socket = site.source_socket();
    let mut home =
        [Client::connect(&socket, "shop/data", READY_WITHIN)?, Client::connect(&socket, "shop/log", READY_WITHIN)?];
    home[0].read(0, &mut [0; BLOCK])?;
    let switch = verb.elapsed();
    for step in &operation.steps {
        display.line(&format!("   {:<18} {}", step.name, step.detail));
    }
    let blocks_compared = held.iter().map(|disk| disk.blocks).sum();
    for (client, held) in home.iter_mut().zip(&held) {
        if fingerprint(client)? != *held {
            return fail("a disk of the source is not what the replica's machine had written".to_owned());
        }
    }
    display.line(&format!("   {blocks_compared} blocks: both disks of the source are what the machine had written"));

    display.headline("10 Protected again from the source: commit");
    drop(home);
    wait_protected_again(api).await?;
    api.commit(GROUP).await?;
    wait_protected(api, display).await?;
    let bytes = (differing + live) * BLOCK as u64;
    display.line(&format!("   {sent} bytes were sent for {bytes} that had to be"));
    Ok(Back { bytes_ratio: sent as f64 / bytes.max(1) as f64, switch_ms: switch.as_secs_f64() * 1e3, blocks_compared })
}

fn views_of(sides: &Sides<'_>) -> io::Result<[Client; 2]> {
    let (socket, exports) = sides.views;
    let connect = |export: &str| Client::connect(socket, export, Duration::from_secs(30));
    Ok([connect(&exports[0])?, connect(&exports[1])?])
}

/// How many blocks of a disk differ from a file.
fn differing_blocks(client: &mut Client, file: &File) -> io::Result<u64> {
    let (mut at, size) = (0, client.size());
    let (mut ours, mut theirs) = (vec![0; READ], vec![0; READ]);
    let mut differing = 0;
    while at < size {
        let length = (size - at).min(READ as u64) as usize;
        client.read(at, &mut ours[..length])?;
        file.read_exact_at(&mut theirs[..length], at)?;
        let pairs = ours[..length].chunks(BLOCK).zip(theirs[..length].chunks(BLOCK));
        differing += pairs.filter(|(a, b)| a != b).count() as u64;
        at += length as u64;
    }
    Ok(differing)
}

/// What a whole disk holds, in short.
#[derive(PartialEq, Eq)]
struct Fingerprint {
    blocks: u64,
    digest: [u8; 32],
}

fn fingerprint(client: &mut Client) -> io::Result<Fingerprint> {
    let (mut at, size) = (0, client.size());
    let mut buffer = vec![0; READ];
    let mut digest = ring::digest::Context::new(&ring::digest::SHA256);
    while at < size {
        let length = (size - at).min(READ as u64) as usize;
        client.read(at, &mut buffer[..length])?;
        digest.update(&buffer[..length]);
        at += length as u64;
    }
    let digest = digest.finish().as_ref().try_into().map_err(io::Error::other)?;
    Ok(Fingerprint { blocks: size / BLOCK as u64, digest })
}

fn contents(mut clients: [Client; 2]) -> io::Result<Vec<Fingerprint>> {
    clients.iter_mut().map(fingerprint).collect()
}

async fn wait_ready(api: &mut Api, display: &Display, running: &Running) -> io::Result<v1::ReverseStatus> {
    let until = Instant::now() + READY_WITHIN;
    loop {
        let reverse = api.reverse(GROUP).await?;
        if reverse.ready {
            display.end_live();
            return Ok(reverse);
        }
        if Instant::now() > until {
            return fail(format!("the failback is not ready after {} s: {}", READY_WITHIN.as_secs(), reverse.missing));
        }
        display.reverse(&reverse, running.writes());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Until the source's disks are protected: only then a failback can be committed.
async fn wait_protected_again(api: &mut Api) -> io::Result<()> {
    let until = Instant::now() + READY_WITHIN;
    while !api.can_commit(GROUP).await {
        if Instant::now() > until {
            return fail("the source is not protected again".to_owned());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}
