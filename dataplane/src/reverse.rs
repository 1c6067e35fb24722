//! A target whose views can be protected themselves: what a failed over machine writes is shipped back to where it came
//! from.
//!
//! ```text
//! hosts ─▶ view ─▶ delta                                   as it is
//! hosts ─▶ source disk ─▶ loopback ─▶ view ─▶ delta        captured: numbered, sealed, shipped like any disk's writes
//! ```
//! A source, like those that serve disks, has disks of views for files. Hosts notice nothing: they keep their connections,
//! and what they ask goes by way of the source from the next request on. The source begins to read and write only when
//! everything that hosts had asked before has been answered; it is then given back in the same manner. A view that is to
//! be captured is not offered before it is: what a host wrote in between, after a restart, would be missing.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::{Deref, DerefMut};

use afterimage_wire::ids::StreamId;

use crate::host::{Answer, DiskKey, Disks, Export, Geometry, HostDisk, Request};
use crate::io::tapped::{TAP_PREFIX, Tapped};
use crate::io::{Allocation, Done, Errno, FileInfo, Io, Nanos, Token};
use crate::loopback::Loopback;
use crate::source::{GroupConfig, ProtectError, Source};
use crate::target::Target;

/// When a buffer is waited for, how long until the next look.
const STARVED: Nanos = 1_000_000;

/// A disk of a view that a source has.
#[derive(Debug)]
struct Captured {
    stream: StreamId,
    /// As the source opens it.
    path: String,
    /// At the source.
    disk: DiskKey,
    /// Nothing that hosts asked of the view itself is under way.
    settled: bool,
    /// It is being given back: what hosts ask waits until the source has let go of it.
    parting: bool,
    /// The source has been told to.
    told: bool,
    waiting: VecDeque<(u64, Request)>,
    answers: VecDeque<Answer>,
}

/// See the module. All that a [`Target`] does, it does.
pub struct ReversibleTarget<I: Io> {
    target: Target<Tapped<I>>,
    /// Of the views that are captured.
    pub source: Source<Tapped<I>>,
    loopback: Loopback,
    /// By the view's key, which hosts know it by.
    captured: BTreeMap<DiskKey, Captured>,
    /// Views that are offered only once they are captured.
    kept_back: BTreeSet<String>,
    starved_at: Option<Nanos>,
}

impl<I: Io> Deref for ReversibleTarget<I> {
    type Target = Target<Tapped<I>>;

    fn deref(&self) -> &Self::Target {
        &self.target
    }
}

impl<I: Io> DerefMut for ReversibleTarget<I> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.target
    }
}

/// The view that an export is of.
fn view_of(export: &str) -> &str {
    export.split_once('/').map_or(export, |(view, _)| view)
}

/// The path by which a group names a disk of a view.
pub fn path_of(view: &str, disk: &str) -> String {
    format!("{TAP_PREFIX}{view}/{disk}")
}

impl<I: Io> ReversibleTarget<I> {
    /// Of a target, and a source without groups.
    pub fn new(target: Target<Tapped<I>>, source: Source<Tapped<I>>) -> Self {
        Self {
            target,
            source,
            loopback: Loopback::default(),
            captured: BTreeMap::new(),
            kept_back: BTreeSet::new(),
            starved_at: None,
        }
    }

    /// These views are to be captured: where one is not open yet, hosts find it only when it is. Hosts of one that is open
    /// keep it.
    pub fn keep_back(&mut self, views: impl IntoIterator<Item = String>) {
        let exports = self.target.exports();
        let open = |view: &String| exports.iter().any(|export| view_of(&export.name) == view);
        let kept_back = std::mem::take(&mut self.kept_back);
        self.kept_back = views.into_iter().filter(|view| kept_back.contains(view) || !open(view)).collect();
    }

    /// Protects disks of views: their paths are as [`path_of`] gives them.
    ///
    /// # Errors
    /// As [`Source::protect`]; a view that is not open, or only for reading, is a file that cannot be opened.
    pub fn capture(&mut self, io: &mut Tapped<I>, config: GroupConfig) -> Result<(), ProtectError> {
        let stream = config.stream;
        let paths: Vec<_> = config.disks.iter().map(|disk| (disk.id, disk.path.clone())).collect();
        let exports = self.target.exports();
        let mut offered = Vec::new();
        for (id, path) in &paths {
            let name = path.strip_prefix(TAP_PREFIX).unwrap_or_default();
            let found = exports.iter().find(|export| export.name == *name);
            let fits = found.filter(|export| !export.geometry.read_only && !self.captured.contains_key(&export.key));
            let Some(export) = fits else {
                offered.iter().for_each(|(_, _, path): &(_, _, String)| io.taps.withdraw(path));
                let errno = if found.is_some() { Errno::BUSY } else { Errno::NOENT };
                return Err(ProtectError::File { path: path.clone(), action: "capture the view", errno });
            };
            let info = FileInfo {
                size: export.geometry.size,
                block: export.geometry.block.clamp(512, 4096),
                physical_block: export.geometry.physical_block.max(512),
                discard: true,
                // Nobody writes to it but through here: there is no time of change to tell of others.
                device: true,
                mtime_ns: 0,
                identity: self.target.view_identity(view_of(name)),
            };
            io.taps.offer(path, info);
            offered.push((*id, export.key, path.clone()));
        }
        let protected = self.source.protect(io, config);
        if protected.is_err() {
            offered.iter().for_each(|(_, _, path)| io.taps.withdraw(path));
            return protected;
        }
        for (id, key, path) in offered {
            let Some(disk) = self.source.disk_key(stream, id) else { continue };
            let captured = Captured {
                stream,
                path,
                disk,
                settled: false,
                parting: false,
                told: false,
                waiting: VecDeque::new(),
                answers: VecDeque::new(),
            };
            self.captured.insert(key, captured);
        }
        for (_, path) in &paths {
            self.kept_back.remove(view_of(path.strip_prefix(TAP_PREFIX).unwrap_or_default()));
        }
        Ok(())
    }

    /// Ends the protection of views cleanly; hosts go on with the views themselves. [`SourceEvent::Stopped`] says when.
    ///
    /// [`SourceEvent::Stopped`]: crate::source::SourceEvent::Stopped
    pub fn release(&mut self, io: &mut Tapped<I>, stream: StreamId) {
        for captured in self.captured.values_mut().filter(|captured| captured.stream == stream) {
            captured.parting = true;
        }
        self.turn(io);
    }

    /// What hosts had asked of the source is answered by it; then it is told to let go.
    fn part(&mut self, io: &mut Tapped<I>) {
        let parting = |captured: &&Captured| captured.parting && !captured.told;
        let streams: BTreeSet<StreamId> = self.captured.values().filter(parting).map(|c| c.stream).collect();
        for stream in streams {
            let mut disks = self.captured.values_mut().filter(|captured| captured.stream == stream);
            if disks.all(|captured| self.source.is_drained(captured.disk)) {
                let disks = self.captured.values_mut().filter(|captured| captured.stream == stream);
                disks.for_each(|captured| captured.told = true);
                self.source.unprotect(io, stream);
            }
        }
    }

    /// The streams of captured views.
    pub fn captures(&self, stream: StreamId) -> bool {
        self.captured.values().any(|captured| captured.stream == stream)
    }

    /// The key by which hosts know a disk of the source.
    pub fn view_key(&self, disk: DiskKey) -> Option<DiskKey> {
        self.captured.iter().find(|(_, captured)| captured.disk == disk).map(|(key, _)| *key)
    }

    /// True if a completion with this token is ours.
    pub fn owns(&self, token: Token) -> bool {
        self.target.owns(token) || self.source.owns(token)
    }

    /// A completion of ours.
    pub fn done(&mut self, io: &mut Tapped<I>, done: Done) {
        if self.source.owns(done.token) {
            self.source.done(io, done);
        } else {
            self.target.done(io, done);
        }
    }

    /// Moves what is queued; call after the completions of a poll.
    pub fn turn(&mut self, io: &mut Tapped<I>) {
        self.target.turn(io);
        if self.captured.is_empty() {
            return self.source.turn(io);
        }
        self.stash();
        self.source.turn(io);
        self.part(io);
        for (key, captured) in &mut self.captured {
            captured.settled |= self.target.is_settled(*key);
        }
        let captured = &self.captured;
        self.loopback.ask(io, &mut self.target, |path| {
            let (key, found) = captured.iter().find(|(_, captured)| captured.path == path && captured.settled)?;
            Some((*key, found.told))
        });
        self.starved_at = self.loopback.starved.then(|| io.now() + STARVED);
        self.bring(io);
        self.end_parting(io);
    }

    /// What the source has answered of disks that are being given back is kept here: the source's disk goes without it.
    fn stash(&mut self) {
        for captured in self.captured.values_mut().filter(|captured| captured.parting) {
            if let Some(answers) = self.source.answers_of(captured.disk) {
                captured.answers.append(answers);
            }
        }
    }

    /// Answers of views: to the source, or, of what hosts had asked before the view was captured, to them.
    fn bring(&mut self, io: &mut Tapped<I>) {
        for (key, captured) in &mut self.captured {
            let Some(answers) = self.target.answers_of(*key) else { continue };
            self.loopback.collect(io, answers);
            captured.answers.append(answers);
        }
    }

    /// Disks that the source has let go of are the view's again.
    fn end_parting(&mut self, io: &mut Tapped<I>) {
        let source = &self.source;
        let ended = |captured: &Captured| captured.parting && source.has_closed(captured.disk);
        let keys: Vec<_> = self.captured.iter().filter(|(_, c)| ended(c)).map(|(key, _)| *key).collect();
        for key in keys {
            let Some(mut captured) = self.captured.remove(&key) else { continue };
            io.taps.withdraw(&captured.path);
            if let Some(answers) = self.target.answers_of(key) {
                captured.answers.append(answers);
                answers.append(&mut captured.answers);
            }
            for (cookie, request) in captured.waiting {
                if let Some(mut disk) = self.target.disk(key) {
                    disk.request(io, cookie, request);
                }
            }
        }
    }

    /// When [`Self::turn`] is wanted at the latest; a past time means at once, after a poll that does not wait.
    pub fn deadline(&self) -> Option<Nanos> {
        [self.target.deadline(), self.source.deadline(), self.starved_at].into_iter().flatten().min()
    }

    /// Nothing of the source is open or under way.
    pub fn is_idle(&self) -> bool {
        self.source.is_idle() && self.loopback.is_idle()
    }

    fn is_offered(&self, key: DiskKey, view: &str) -> bool {
        self.captured.contains_key(&key) || !self.kept_back.contains(view)
    }
}

impl<I: Io> Disks<Tapped<I>> for ReversibleTarget<I> {
    fn exports(&self) -> Vec<Export> {
        self.target.exports().into_iter().filter(|e| self.is_offered(e.key, view_of(&e.name))).collect()
    }

    fn disk(&mut self, key: DiskKey) -> Option<impl HostDisk<Tapped<I>> + '_> {
        let offered = self.target.view_name(key).is_some_and(|view| self.is_offered(key, view));
        offered.then_some(Disk { all: self, key })
    }
}

/// A disk of a view, borrowed.
struct Disk<'a, I: Io> {
    all: &'a mut ReversibleTarget<I>,
    key: DiskKey,
}

impl<I: Io> HostDisk<Tapped<I>> for Disk<'_, I> {
    fn geometry(&self) -> Geometry {
        self.all.target.geometry_of(self.key).expect("it was there when it was borrowed")
    }

    fn request(&mut self, io: &mut Tapped<I>, cookie: u64, request: Request) {
        match self.all.captured.get_mut(&self.key) {
            None => {
                if let Some(mut disk) = self.all.target.disk(self.key) {
                    disk.request(io, cookie, request);
                }
            }
            Some(captured) if captured.parting => captured.waiting.push_back((cookie, request)),
            Some(captured) => match self.all.source.disk(captured.disk) {
                Some(mut disk) => disk.request(io, cookie, request),
                None => captured.answers.push_back(Answer { cookie, result: Err(Errno::IO) }),
            },
        }
    }

    fn answers(&mut self) -> &mut VecDeque<Answer> {
        match self.all.captured.get_mut(&self.key) {
            Some(captured) => {
                if let Some(answers) = self.all.source.answers_of(captured.disk) {
                    captured.answers.append(answers);
                }
                &mut captured.answers
            }
            None => self.all.target.answers_of(self.key).expect("it was there when it was borrowed"),
        }
    }

    fn allocation(&mut self, io: &mut Tapped<I>, offset: u64) -> Result<Allocation, Errno> {
        self.all.target.disk(self.key).ok_or(Errno::IO)?.allocation(io, offset)
    }
}
