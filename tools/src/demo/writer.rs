//! The demo's application: a little database over two disks, and what it remembers of its own writes.
//!
//! It works in *transactions*. Transaction `t` writes a few blocks of the data disk (in flight together), waits for all
//! answers, then writes its commit block to the log disk and waits. So at any crash-consistent moment: if the log holds
//! commit `c`, the data of every transaction up to `c` is there; data of `c + 1` may be partly there; nothing of
//! `c + 2` exists. Every block says what it is: disk, block, transaction, write number, time.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::nbd_client::Client;

/// Bytes of a block.
pub const BLOCK: usize = 4096;
/// Data blocks of a transaction.
const DATA_PER_TRANSACTION: u64 = 3;
/// A flush after so many transactions.
const FLUSH_EVERY: u64 = 64;
const MAGIC: u64 = 0x4166_7465_7249_6d67;

/// Which disk of the pair.
#[derive(Copy, Clone, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub enum Disk {
    /// The larger one.
    Data = 0,
    /// The smaller one, with a commit block for each transaction.
    Log = 1,
}

/// What a block says of itself.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Stamp {
    /// Its disk.
    pub disk: Disk,
    /// Its number on the disk.
    pub block: u64,
    /// Transaction, from 1.
    pub transaction: u64,
    /// Write number over both disks, from 1.
    pub write: u64,
    /// Wall clock when it was made, nanoseconds since the Unix epoch.
    pub wall_ns: u64,
}

/// Fills a block: the stamp, text that compresses as a database page does, noise that does not, a checksum.
pub fn fill(stamp: &Stamp, page: &mut [u8; BLOCK]) {
    let words = [MAGIC, stamp.disk as u64, stamp.block, stamp.transaction, stamp.write, stamp.wall_ns];
    let mut state = stamp.write.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ stamp.block;
    for (number, chunk) in page.chunks_exact_mut(8).enumerate() {
        let word = match (words.get(number), number % 3) {
            (Some(word), _) => *word,
            (None, 0) => {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state
            }
            (None, _) => u64::from_le_bytes(*b"account "),
        };
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    let sum = checksum(&page[..BLOCK - 8]);
    page[BLOCK - 8..].copy_from_slice(&sum.to_le_bytes());
}

/// What a block says: nothing for an unwritten one.
///
/// # Errors
/// A block that is neither zeros nor whole: torn, or not of this writer.
pub fn read_stamp(page: &[u8]) -> Result<Option<Stamp>, String> {
    if page.iter().all(|b| *b == 0) {
        return Ok(None);
    }
    let word = |n: usize| u64::from_le_bytes(page[n * 8..n * 8 + 8].try_into().expect("8 bytes"));
    if word(0) != MAGIC || checksum(&page[..BLOCK - 8]) != word(BLOCK / 8 - 1) {
        return Err("torn or foreign content".to_owned());
    }
    let disk = match word(1) {
        0 => Disk::Data,
        1 => Disk::Log,
        other => return Err(format!("names disk {other}")),
    };
    Ok(Some(Stamp { disk, block: word(2), transaction: word(3), write: word(4), wall_ns: word(5) }))
}

fn checksum(bytes: &[u8]) -> u64 {
    bytes.chunks_exact(8).fold(0xcbf2_9ce4_8422_2325, |sum, chunk| {
        (sum ^ u64::from_le_bytes(chunk.try_into().expect("8 bytes")))
            .wrapping_mul(0x0000_0100_0000_01b3)
            .rotate_left(23)
    })
}

/// Nanoseconds since the Unix epoch.
pub fn wall_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

/// One write that the writer remembers.
#[derive(Copy, Clone, Debug)]
pub struct Written {
    /// Disk.
    pub disk: Disk,
    /// Block.
    pub block: u64,
    /// Transaction.
    pub transaction: u64,
    /// Write number.
    pub write: u64,
    /// When it was sent, wall clock, nanoseconds.
    pub sent_ns: u64,
    /// When the answer came; `u64::MAX` if none did.
    pub answered_ns: u64,
}

/// All that the writer knows, in the order in which it wrote.
#[derive(Debug, Default)]
pub struct Memory {
    /// Every write sent.
    pub writes: Vec<Written>,
    /// Why the writer stopped, if by an error.
    pub ended_by: Option<String>,
}

/// Counters that the display reads while the writer runs.
#[derive(Debug, Default)]
pub struct Progress {
    /// Answered writes.
    pub writes: AtomicU64,
    /// Committed transactions.
    pub transactions: AtomicU64,
    /// Set to end the writer.
    pub stop: AtomicBool,
}

/// Where the writer writes.
#[derive(Debug, Clone)]
pub struct Places<'a> {
    /// The proxy's NBD socket.
    pub socket: &'a Path,
    /// Export of the data disk.
    pub data: &'a str,
    /// Export of the log disk.
    pub log: &'a str,
}

/// Writes until told to stop or until the disk goes away; at most `max_writes`, so that memory is bounded.
///
/// # Errors
/// The disks could not be opened at all. Losing them later is no error: it is the demo.
pub fn run(places: &Places<'_>, progress: &Progress, max_writes: usize) -> io::Result<Memory> {
    let timeout = Duration::from_secs(20);
    let mut data = Client::connect(places.socket, places.data, timeout)?;
    let mut log = Client::connect(places.socket, places.log, timeout)?;
    let mut memory = Memory { writes: Vec::with_capacity(max_writes), ended_by: None };
    let mut page = [0; BLOCK];
    let mut state = 0x1234_5678_9abc_def1u64;
    let (data_blocks, log_blocks) = (data.size() / BLOCK as u64, log.size() / BLOCK as u64);
    let mut transaction = 0;
    while !progress.stop.load(Ordering::Relaxed) && memory.writes.len() + 4 <= max_writes {
        transaction += 1;
        let first = memory.writes.len();
        let result = (|| -> io::Result<()> {
            for _ in 0..DATA_PER_TRANSACTION {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                // Half of the writes go to a hot sixteenth, as in a database; a block is not written twice within one
                // transaction, since writes in flight together have no order.
                let range = if state & 1 == 0 { data_blocks / 16 } else { data_blocks };
                let mut block = (state >> 8) % range;
                while memory.writes[first..].iter().any(|w| w.block == block) {
                    block = (block + 1) % data_blocks;
                }
                send(&mut data, &mut memory, Disk::Data, block, transaction, &mut page)?;
            }
            for _ in 0..DATA_PER_TRANSACTION {
                data.answer()?;
            }
            let now = wall_ns();
            for written in &mut memory.writes[first..] {
                written.answered_ns = now;
            }
            if transaction.is_multiple_of(FLUSH_EVERY) {
                data.flush()?;
            }
            send(&mut log, &mut memory, Disk::Log, transaction % log_blocks, transaction, &mut page)?;
            log.answer()?;
            memory.writes.last_mut().expect("just sent").answered_ns = wall_ns();
            if transaction.is_multiple_of(FLUSH_EVERY) {
                log.flush()?;
            }
            Ok(())
        })();
        if let Err(error) = result {
            memory.ended_by = Some(error.to_string());
            break;
        }
        progress.writes.store(memory.writes.len() as u64, Ordering::Relaxed);
        progress.transactions.store(transaction, Ordering::Relaxed);
    }
    // Bounded by `max_writes` only: the disaster comes while the writer waits or writes, both are right.
    let waiting_since = Instant::now();
    while memory.ended_by.is_none()
        && !progress.stop.load(Ordering::Relaxed)
        && waiting_since.elapsed() < Duration::from_secs(60)
    {
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(memory)
}

fn send(
    client: &mut Client,
    memory: &mut Memory,
    disk: Disk,
    block: u64,
    transaction: u64,
    page: &mut [u8; BLOCK],
) -> io::Result<()> {
    let write = memory.writes.len() as u64 + 1;
    let sent_ns = wall_ns();
    fill(&Stamp { disk, block, transaction, write, wall_ns: sent_ns }, page);
    memory.writes.push(Written { disk, block, transaction, write, sent_ns, answered_ns: u64::MAX });
    client.send_write(block * BLOCK as u64, page, false).map(drop)
}
