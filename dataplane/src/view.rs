//! Views: a restore point as disks. A read lays the delta over the journal over the replica image.
//!
//! - [`Reads`], here: requests under way, their pieces, and the operations that bring them.
//! - [`cache`]: opened chunks, bounded.
//!
//! A view needs no copy: its point is pinned, so the image below it holds nothing newer, and what folding is about to
//! put there is still found in the index until it is there for good.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use afterimage_wire::chunk::Chunk;
use afterimage_wire::frame::FrameHeader;
use afterimage_wire::stream_state::UnreadableRange;
use afterimage_wire::timeline::TimelineKind;

use crate::host::{Answer, DiskKey, Geometry, HEADROOM};
use crate::index::{Content, Cover, Piece};
use crate::io::{Buf, Done, Errno, File, Io, Op, Part};
use crate::journal::segment::cover_aligned;
use crate::journal::{Journal, Writer};
use crate::scrub::Suspect;
use crate::seal::{open_chunk, payload};
use crate::target::images::Image;
use crate::target::ops::{Ctx, JournalId, Purpose};
use crate::target::stream::Stream;

pub mod cache;

use cache::{Cache, ChunkKey};

/// Reads of views under way; more wait.
const MAX_READS: usize = 64;
/// Room for any chunk or image piece, kept aside so that reads end when the pool is empty, bytes.
const RESERVE: usize = 1_280 * 1024;

/// A disk of a view.
#[derive(Debug)]
pub(crate) struct ViewDisk {
    pub key: DiskKey,
    pub slot: u16,
    pub name: String,
    pub geometry: Geometry,
    pub answers: VecDeque<Answer>,
}

/// An open view.
#[derive(Debug)]
pub(crate) struct View {
    pub id: u32,
    pub name: String,
    pub stream: u32,
    pub seq: u64,
    pub kind: TimelineKind,
    /// Its delta, by id, if it is writable.
    pub delta: Option<u32>,
    pub disks: Vec<ViewDisk>,
}

/// A read that a host asked for.
#[derive(Copy, Clone, Debug)]
pub(crate) struct ReadRequest {
    pub key: DiskKey,
    pub cookie: u64,
    pub slot: u16,
    pub seq: u64,
    pub delta: Option<u32>,
    /// The view, whose shelf may come to be before this is begun; or the shelf itself.
    pub view: Option<u32>,
    pub shelf: Option<u32>,
    pub stream: u32,
    pub offset: u64,
    pub len: usize,
}

#[derive(Debug)]
struct Under {
    request: ReadRequest,
    out: Option<Part>,
    left: usize,
    error: Option<Errno>,
}

/// Bytes of a read that an operation brings.
#[derive(Copy, Clone, Debug)]
struct Wanted {
    read: u64,
    /// Where in the answer.
    to: usize,
    len: usize,
    /// Where in what the operation brings.
    from: usize,
}

/// A chunk to be read and opened.
#[derive(Debug)]
struct ChunkRead {
    key: ChunkKey,
    stream: u32,
    journal: JournalId,
    file: File,
    at: u64,
    len: usize,
    skip: usize,
    sealed_len: usize,
    header: FrameHeader,
    writer: Arc<Writer>,
    wanted: Vec<Wanted>,
}

/// A piece of an image to be read.
#[derive(Debug)]
struct ImageRead {
    file: File,
    at: u64,
    len: usize,
    wanted: Wanted,
    /// The whole answer is read straight into its buffer.
    direct: bool,
}

/// Reads of all views of a target.
#[derive(Debug)]
pub(crate) struct Reads {
    next: u64,
    under: HashMap<u64, Under>,
    queue: VecDeque<ReadRequest>,
    chunks: HashMap<u64, ChunkRead>,
    by_key: HashMap<ChunkKey, u64>,
    images: BTreeMap<u64, ImageRead>,
    /// Operations that wait for a buffer.
    stalled: VecDeque<Stalled>,
    reserve: Option<Buf>,
    cache: Cache,
    cover: Cover,
    pieces: Vec<Piece>,
    pub answers: Vec<(DiskKey, Answer)>,
    /// Frames of streams that could not be read.
    pub suspects: Vec<(u32, Suspect)>,
    /// Readers of segments that have ended.
    released: Vec<(u32, JournalId, u64)>,
}

#[derive(Copy, Clone, Debug)]
enum Stalled {
    Chunk(u64),
    Image(u64),
}

impl Reads {
    /// None yet; opened chunks take at most `cache_bytes`.
    pub fn new(cache_bytes: usize) -> Self {
        Self {
            next: 1,
            under: HashMap::new(),
            queue: VecDeque::new(),
            chunks: HashMap::new(),
            by_key: HashMap::new(),
            images: BTreeMap::new(),
            stalled: VecDeque::new(),
            reserve: None,
            cache: Cache::new(cache_bytes),
            cover: Cover::default(),
            pieces: Vec::new(),
            answers: Vec::new(),
            suspects: Vec::new(),
            released: Vec::new(),
        }
    }

    /// Something waits for a buffer.
    pub fn is_starved(&self) -> bool {
        !self.queue.is_empty() || !self.stalled.is_empty()
    }

    /// Number of the next read of an image.
    pub fn next_number(&self) -> u64 {
        self.next
    }

    /// A read of an image that was begun before this number is under way.
    pub fn is_before(&self, number: u64) -> bool {
        self.images.first_key_value().is_some_and(|(first, _)| *first < number)
    }

    /// Takes a read.
    pub fn ask(&mut self, request: ReadRequest) {
        self.queue.push_back(request);
    }

    /// Begins what waits; gives ended readers back to the journals.
    pub fn turn<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, streams: &mut BTreeMap<u32, Stream>) {
        for _ in 0..self.stalled.len() {
            let Some(stalled) = self.stalled.pop_front() else { break };
            self.submit(ctx, stalled);
        }
        while self.stalled.is_empty() && self.under.len() < MAX_READS {
            let Some(request) = self.queue.pop_front() else { break };
            let Some(stream) = streams.get_mut(&request.stream) else {
                self.refuse(&request, Errno::IO);
                continue;
            };
            if !self.begin(ctx, stream, request) {
                self.queue.push_front(request);
                break;
            }
        }
        for (stream, journal, uid) in self.released.drain(..) {
            if let Some(journal) = streams.get_mut(&stream).and_then(|stream| stream.journal_mut(journal)) {
                journal.release(ctx.io, uid);
            }
        }
    }

    fn refuse(&mut self, request: &ReadRequest, errno: Errno) {
        self.answers.push((request.key, Answer { cookie: request.cookie, result: Err(errno) }));
    }

    /// False: there is no buffer for it now.
    fn begin<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, stream: &mut Stream, request: ReadRequest) -> bool {
        if self.reserve.is_none() {
            self.reserve = ctx.io.pool().take(RESERVE);
        }
        let shelf = request.shelf.or_else(|| {
            let view = request.view?;
            stream.view_pins.iter().find(|pin| pin.view == view)?.shelf
        });
        let shelf = shelf.and_then(|id| stream.deltas.iter().find(|delta| delta.id == id));
        if shelf.is_some_and(|shelf| shelf.damaged) {
            // What is missing of it must not be taken from an image that has gone on.
            self.refuse(&request, Errno::IO);
            return true;
        }
        let at = HEADROOM + (request.offset % 4096) as usize;
        let Some(buf) = ctx.io.pool().take(at + request.len + 4096) else { return false };
        let end = request.offset + request.len as u64;
        let mut cover = std::mem::take(&mut self.cover);
        let mut pieces = std::mem::take(&mut self.pieces);
        cover.start(request.offset, end);
        if let Some(delta) = request.delta.and_then(|id| stream.deltas.iter().find(|delta| delta.id == id)) {
            delta.journal.cover(&mut cover, request.slot, u64::MAX);
        }
        if let Some(shelf) = shelf {
            shelf.journal.cover(&mut cover, request.slot, u64::MAX);
        }
        let seq = if mutant!(ViewReadsOn) { u64::MAX } else { request.seq };
        stream.journal.cover(&mut cover, request.slot, seq);
        pieces.clear();
        pieces.extend_from_slice(cover.finish());
        self.cover = cover;
        let read = self.next;
        self.next += 1;
        let out = Part { buf, at, len: request.len };
        self.under.insert(read, Under { request, out: Some(out), left: 1, error: None });
        let alone = pieces.len() == 1;
        for piece in &pieces {
            self.begin_piece(ctx, stream, read, &request, piece, alone);
        }
        self.pieces = pieces;
        self.piece_done(read, None);
        true
    }

    fn begin_piece<I: Io>(
        &mut self,
        ctx: &mut Ctx<'_, I>,
        stream: &mut Stream,
        read: u64,
        request: &ReadRequest,
        piece: &Piece,
        alone: bool,
    ) {
        let to = (piece.offset - request.offset) as usize;
        let mut wanted = Wanted { read, to, len: piece.len as usize, from: 0 };
        match piece.content {
            Content::Zero => self.zeros(&wanted),
            Content::Unreadable => self.error(read, Errno::IO),
            Content::Below => {
                let image = stream.images.get(&request.slot).copied();
                self.below(ctx, &stream.history.state().unreadable, image, request.slot, piece, wanted, alone);
            }
            Content::Data { segment, frame, chunk, at } => {
                wanted.from = at as usize;
                let key = ChunkKey { segment, frame, chunk };
                if let Some(plain) = self.cache.get(key) {
                    let result = copy(self.under.get_mut(&read), &wanted, &plain);
                    if let Err(errno) = result {
                        self.error(read, errno);
                    }
                    return;
                }
                self.count(read);
                if let Some(under_way) = self.by_key.get(&key).and_then(|id| self.chunks.get_mut(id)) {
                    under_way.wanted.push(wanted);
                    return;
                }
                if let Err(errno) = self.begin_chunk(ctx, stream, key, wanted) {
                    self.piece_done(read, Some(errno));
                }
            }
        }
    }

    fn begin_chunk<I: Io>(
        &mut self,
        ctx: &mut Ctx<'_, I>,
        stream: &mut Stream,
        key: ChunkKey,
        wanted: Wanted,
    ) -> Result<(), Errno> {
        let (id, journal) = stream.journal_of(key.segment).ok_or(Errno::IO)?;
        let file = journal.open_for_read(ctx.io, key.segment)?;
        let segment = journal.segment_mut(key.segment).ok_or(Errno::IO)?;
        let (at, sealed_len) = segment.locate(key.frame, key.chunk).ok_or(Errno::IO)?;
        let header = segment.header(segment.frames.get(key.frame as usize).ok_or(Errno::IO)?);
        segment.users += 1;
        let writer = segment.writer.clone();
        let (at, len, skip) = cover_aligned(at, sealed_len, 4096);
        let number = self.next;
        self.next += 1;
        let (stream, wanted) = (stream.id, vec![wanted]);
        let read = ChunkRead { key, stream, journal: id, file, at, len, skip, sealed_len, header, writer, wanted };
        self.chunks.insert(number, read);
        self.by_key.insert(key, number);
        self.submit(ctx, Stalled::Chunk(number));
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn below<I: Io>(
        &mut self,
        ctx: &mut Ctx<'_, I>,
        unreadable: &[UnreadableRange],
        image: Option<Image>,
        slot: u16,
        piece: &Piece,
        wanted: Wanted,
        alone: bool,
    ) {
        let end = piece.offset + piece.len;
        let hits = |range: &UnreadableRange| {
            range.slot == slot && range.offset < end && piece.offset < range.offset + range.len
        };
        if unreadable.iter().any(hits) {
            return self.error(wanted.read, Errno::IO);
        }
        let Some(image) = image.filter(|image| piece.offset < image.size) else { return self.zeros(&wanted) };
        let inside = (image.size - piece.offset).min(piece.len) as usize;
        if inside < wanted.len {
            self.zeros(&Wanted { to: wanted.to + inside, len: wanted.len - inside, ..wanted });
        }
        self.count(wanted.read);
        let (at, len, skip) = cover_aligned(piece.offset, inside, image.block as usize);
        let wanted = Wanted { len: inside, from: skip, ..wanted };
        let direct = alone && skip == 0 && len == inside;
        let number = self.next;
        self.next += 1;
        self.images.insert(number, ImageRead { file: image.file, at, len, wanted, direct });
        self.submit(ctx, Stalled::Image(number));
    }

    /// Submits a read, or keeps it until there is a buffer.
    fn submit<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, what: Stalled) {
        let len = match what {
            Stalled::Chunk(number) => self.chunks.get(&number).map_or(0, |read| read.len),
            Stalled::Image(number) => self.images.get(&number).map_or(0, |read| read.len),
        };
        if let Stalled::Image(number) = what
            && let Some(read) = self.images.get(&number).filter(|read| read.direct)
            && let Some(out) = self.under.get_mut(&read.wanted.read).and_then(|under| under.out.take())
        {
            return ctx.submit(Purpose::Image(number), Op::Read { file: read.file, offset: read.at, part: out });
        }
        let buf = match ctx.io.pool().take(len) {
            Some(buf) => buf,
            None if self.reserve.as_ref().is_some_and(|reserve| reserve.len() >= len) => {
                self.reserve.take().expect("looked at in the guard")
            }
            None => return self.stalled.push_back(what),
        };
        let part = Part { buf, at: 0, len };
        match what {
            Stalled::Chunk(number) => {
                let Some(read) = self.chunks.get(&number) else { return };
                ctx.submit(Purpose::Chunk(number), Op::Read { file: read.file, offset: read.at, part });
            }
            Stalled::Image(number) => {
                let Some(read) = self.images.get(&number) else { return };
                ctx.submit(Purpose::Image(number), Op::Read { file: read.file, offset: read.at, part });
            }
        }
    }

    fn keep_reserve(&mut self, buf: Buf) {
        if self.reserve.is_none() && buf.len() >= RESERVE {
            self.reserve = Some(buf);
        }
    }

    /// A chunk has been read, or not.
    pub fn on_chunk(&mut self, number: u64, done: Done) {
        let Some(mut read) = self.chunks.remove(&number) else { return };
        self.by_key.remove(&read.key);
        self.released.push((read.stream, read.journal, read.key.segment));
        let mut plain = self.cache.spare();
        let opened = done.result.map_err(|errno| errno.to_string()).and_then(|_| {
            let part = done.part.ok_or("no buffer came back")?;
            let mut buf = part.buf;
            let sealed = &mut buf[read.skip..read.skip + read.sealed_len];
            let result = open_chunk(&read.writer.key, &read.header, read.key.chunk.into(), sealed)
                .map_err(|error| error.to_string())
                .and_then(|bytes| Chunk::parse(bytes).map_err(|error| error.to_string()))
                .and_then(|chunk| {
                    if chunk.codec == afterimage_wire::chunk::Codec::Plain {
                        plain.clear();
                        plain.extend_from_slice(chunk.stored);
                        return Ok(());
                    }
                    payload(&chunk, &mut plain).map(|_| ()).map_err(|error| error.to_string())
                });
            self.keep_reserve(buf);
            result
        });
        match opened {
            Ok(()) => {
                let plain = Arc::new(plain);
                for wanted in read.wanted.drain(..) {
                    let result = copy(self.under.get_mut(&wanted.read), &wanted, &plain);
                    self.piece_done(wanted.read, result.err());
                }
                self.cache.put(read.key, plain);
            }
            Err(why) => {
                tracing::error!(frame = read.header.number.get(), why, "a chunk of the journal cannot be read");
                let (journal, segment, frame) = (read.journal, read.key.segment, read.key.frame);
                self.suspects.push((read.stream, Suspect { journal, segment, frame }));
                for wanted in read.wanted.drain(..) {
                    self.piece_done(wanted.read, Some(Errno::IO));
                }
            }
        }
    }

    /// A piece of an image has been read, or not.
    pub fn on_image(&mut self, number: u64, done: Done) {
        let Some(read) = self.images.remove(&number) else { return };
        let wanted = read.wanted;
        let mut error = done.result.err();
        match done.part {
            Some(part) if read.direct => {
                if let Some(under) = self.under.get_mut(&wanted.read) {
                    under.out = Some(part);
                }
            }
            Some(part) => {
                if error.is_none() {
                    error = copy(self.under.get_mut(&wanted.read), &wanted, &part.buf).err();
                }
                self.keep_reserve(part.buf);
            }
            None => error = error.or(Some(Errno::IO)),
        }
        self.piece_done(wanted.read, error);
    }

    fn count(&mut self, read: u64) {
        if let Some(under) = self.under.get_mut(&read) {
            under.left += 1;
        }
    }

    fn zeros(&mut self, wanted: &Wanted) {
        if let Some(out) = self.under.get_mut(&wanted.read).and_then(|under| under.out.as_mut()) {
            let at = out.at + wanted.to;
            out.buf[at..at + wanted.len].fill(0);
        }
    }

    fn error(&mut self, read: u64, errno: Errno) {
        if let Some(under) = self.under.get_mut(&read) {
            under.error.get_or_insert(errno);
        }
    }

    fn piece_done(&mut self, read: u64, error: Option<Errno>) {
        if let Some(errno) = error {
            self.error(read, errno);
        }
        let Some(under) = self.under.get_mut(&read) else { return };
        under.left -= 1;
        if under.left > 0 {
            return;
        }
        if let Some(under) = self.under.remove(&read) {
            let result = match (under.error, under.out) {
                (None, Some(out)) => Ok(Some(out)),
                (error, _) => Err(error.unwrap_or(Errno::IO)),
            };
            self.answers.push((under.request.key, Answer { cookie: under.request.cookie, result }));
        }
    }

    /// Requests of a view that is gone.
    pub fn forget(&mut self, keys: &[DiskKey]) {
        self.queue.retain(|request| !keys.contains(&request.key));
    }
}

fn copy(under: Option<&mut Under>, wanted: &Wanted, plain: &[u8]) -> Result<(), Errno> {
    let Some(out) = under.and_then(|under| under.out.as_mut()) else { return Ok(()) };
    let bytes = plain.get(wanted.from..wanted.from + wanted.len).ok_or(Errno::IO)?;
    let at = out.at + wanted.to;
    out.buf[at..at + wanted.len].copy_from_slice(bytes);
    Ok(())
}

impl Stream {
    /// The journal of the stream, or of one of its deltas.
    pub(crate) fn journal_mut(&mut self, id: JournalId) -> Option<&mut Journal> {
        match id {
            JournalId::Stream(_) => Some(&mut self.journal),
            JournalId::Delta(id) => self.deltas.iter_mut().find(|delta| delta.id == id).map(|delta| &mut delta.journal),
        }
    }

    fn journal_of(&mut self, segment: u64) -> Option<(JournalId, &mut Journal)> {
        if self.journal.segment(segment).is_some() {
            return Some((self.journal.id, &mut self.journal));
        }
        let delta = self.deltas.iter_mut().find(|delta| delta.journal.segment(segment).is_some())?;
        Some((delta.journal.id, &mut delta.journal))
    }
}
