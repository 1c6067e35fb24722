//! Opening, serving and closing views.

use std::collections::VecDeque;

use afterimage_wire::ids::DiskId;
use afterimage_wire::record::RecordKind;
use afterimage_wire::timeline::TimelineKind;

use super::config::{Choice, PointError, TargetError, ViewConfig};
use super::stream::ViewPin;
use super::{MAX_VIEWS, Target};
use crate::delta::{Change, Delta};
use crate::host::{Answer, DiskKey, Disks, Export, Geometry, HostDisk, Request};
use crate::index::points::holds;
use crate::index::{Content, Cover};
use crate::io::{Allocation, Errno, Io};
use crate::shelf::{stream_of, view_of};
use crate::view::{ReadRequest, View, ViewDisk as Disk};

/// How far block status looks at a time, bytes.
const STATUS_RANGE: u64 = 8 << 20;

impl<I: Io> Target<I> {
    /// Presents a point as disks, without copying. The same call again (also after a restart) gives the same view, with
    /// what was written to it.
    ///
    /// # Errors
    /// The point does not exist or does not hold a disk; the name is another view's; storage.
    pub fn open_view(&mut self, io: &mut I, config: ViewConfig) -> Result<Vec<Export>, TargetError> {
        if config.name.is_empty() || config.name.len() > 128 || config.name.contains('/') {
            return Err(TargetError::Config {
                field: "name",
                value: config.name,
                allowed: "1 to 128 bytes without a slash",
            });
        }
        if !matches!(config.kind, TimelineKind::View | TimelineKind::Failover) {
            let value = format!("{:?}", config.kind);
            return Err(TargetError::Config { field: "kind", value, allowed: "View or Failover" });
        }
        self.settle(config.stream);
        let id = self.ready(config.stream)?.id;
        if let Some(open) = self.views.iter().find(|view| view.name == config.name) {
            let same = open.stream == id && open.seq == config.seq && open.delta.is_some() == config.writable;
            return if same { Ok(exports_of(open)) } else { Err(TargetError::NameTaken(config.name)) };
        }
        if self.views.len() >= MAX_VIEWS {
            return Err(TargetError::TooManyViews);
        }
        let next_delta = self.next_id;
        let stream = self.ready(config.stream)?;
        let known = stream.deltas.iter().find(|delta| delta.view.name == config.name);
        let known = known.map(|delta| (delta.id, delta.view.clone()));
        if let Some((_, view)) = &known
            && (!config.writable || view.seq != config.seq || view.kind != config.kind)
        {
            return Err(TargetError::NameTaken(config.name));
        }
        // Of a view that is known its shelf keeps what folding has overwritten, so its point may lie below the floor.
        let shelf = stream.shelf_for(&config.name, config.seq).map(|shelf| (shelf.id, shelf.points.now().clone()));
        let kept = stream.points.kept().is_some_and(|kept| kept.seq == config.seq);
        let below = config.seq < stream.points.floor() && (known.is_some() || kept) && shelf.is_some();
        let (lives, held) = match &shelf {
            Some((_, lives)) if below => (lives.clone(), lives.values().map(|life| life.info.id).collect()),
            _ => {
                let point = stream.choose(Choice::Seq(config.seq))?;
                if let Some(damage) = &point.damage {
                    tracing::warn!(view = config.name, damage, "a point is opened although it is damaged");
                }
                (stream.points.at(point.seq), point.disks)
            }
        };
        let shelf = shelf.map(|(id, _)| id);
        let wanted = known.as_ref().map(|(_, view)| view.disks.clone()).or_else(|| config.disks.clone());
        let wanted: Vec<DiskId> = wanted.unwrap_or(held);
        if wanted.is_empty() {
            return Err(PointError::None.into());
        }
        let mut disks = Vec::new();
        for id in &wanted {
            let Some(life) = lives.values().find(|life| life.info.id == *id) else {
                return Err(PointError::Incomplete { disk: *id, why: "it is not in the stream there" }.into());
            };
            if !below && !holds(life) {
                let why = match (life.member, life.owes_whole) {
                    (false, _) => "it has left the stream there",
                    (true, true) => "it is not whole there",
                    (true, false) => "it is being synchronised there",
                };
                return Err(PointError::Incomplete { disk: *id, why }.into());
            }
            disks.push(life.info.clone());
        }
        for info in &disks {
            stream.ensure_image(io, info).map_err(|errno| TargetError::Storage {
                what: "making the replica image of",
                path: info.id.to_string(),
                errno,
            })?;
        }
        let delta = match (config.writable, known) {
            (false, _) => None,
            (true, Some((id, _))) => Some(id),
            (true, None) => {
                stream.add_delta(io, next_delta, &config, wanted)?;
                Some(next_delta)
            }
        };
        let (stream_id, seq) = (stream.id, config.seq);
        self.next_id += 1;
        let id = self.take_id();
        let disks = disks.iter().map(|info| {
            let key = DiskKey(self.next_key);
            self.next_key += 1;
            let geometry = Geometry {
                size: info.size,
                block: info.block,
                physical_block: info.physical_block,
                read_only: !config.writable,
                discard: config.writable,
                serial: info.serial.clone(),
            };
            Disk { key, slot: info.slot, name: info.name.clone(), geometry, answers: VecDeque::new() }
        });
        let disks = disks.collect();
        let view = View { id, name: config.name, stream: stream_id, seq, kind: config.kind, delta, disks };
        let exports = exports_of(&view);
        if let Some(stream) = self.streams.get_mut(&stream_id) {
            stream.view_pins.push(ViewPin { view: id, name: view.name.clone(), seq, shelf });
        }
        tracing::info!(view = view.name, seq, writable = delta.is_some(), "a view is open");
        self.views.push(view);
        Ok(exports)
    }

    /// Ends a view: requests under way end with an error. `keep_delta` keeps what was written for a later
    /// [`Target::open_view`] of the same name, and keeps its base from being folded.
    ///
    /// # Errors
    /// Not known, or storage.
    pub fn close_view(&mut self, io: &mut I, name: &str, keep_delta: bool) -> Result<(), TargetError> {
        let shut = self.shut_view(name);
        let kept = |delta: &Delta| delta.view.name == name;
        let shelf = |delta: &Delta| view_of(&delta.view.name) == Some(name);
        let mut streams = self.streams.values_mut();
        let Some(stream) = streams.find(|stream| stream.deltas.iter().any(|delta| kept(delta) || shelf(delta))) else {
            return if shut { Ok(()) } else { Err(TargetError::UnknownView(name.to_owned())) };
        };
        let delta = stream.deltas.iter().position(kept);
        if keep_delta && delta.is_some() {
            return Ok(());
        }
        // The shelf goes last: a delta is nothing without it.
        if let Some(at) = delta {
            stream.remove_delta(io, at)?;
        }
        match stream.deltas.iter().position(shelf) {
            Some(at) => {
                stream.shelving.abandon();
                stream.remove_delta(io, at)
            }
            None => Ok(()),
        }
    }

    /// Takes a view off offer.
    pub(super) fn shut_view(&mut self, name: &str) -> bool {
        let Some(at) = self.views.iter().position(|view| view.name == name) else { return false };
        let view = self.views.remove(at);
        let keys: Vec<DiskKey> = view.disks.iter().map(|disk| disk.key).collect();
        self.reads.forget(&keys);
        if let Some(stream) = self.streams.get_mut(&view.stream) {
            stream.view_pins.retain(|pin| pin.view != view.id);
        }
        true
    }

    /// Brings answers to the disks that they are for.
    pub(super) fn deliver(&mut self) {
        let mut answers = std::mem::take(&mut self.delivering);
        answers.append(&mut self.reads.answers);
        for delta in self.streams.values_mut().flat_map(|stream| &mut stream.deltas) {
            answers.append(&mut delta.answers);
        }
        for (key, answer) in answers.drain(..) {
            if let Some(stream) = crate::compare::stream_of(key) {
                if let Some(stream) = self.streams.get_mut(&stream) {
                    let writer = stream.connection.and_then(|id| self.connections.get(&id)).map(|c| &c.writer);
                    let under = writer.map_or(stream.config.policy_key.id, |w| w.wrapped.policy_key);
                    stream.compare.read(&stream.config.policy_key.hash_key(stream.config.stream, under), answer);
                }
                continue;
            }
            if let Some(stream) = super::merge::stream_of(key) {
                if let Some(merge) = self.streams.get_mut(&stream).and_then(|stream| stream.merge.as_mut()) {
                    merge.answer(answer);
                    self.more = true;
                }
                continue;
            }
            if let Some(stream) = stream_of(key) {
                if let Some(stream) = self.streams.get_mut(&stream) {
                    stream.shelving.answers.push(answer);
                    self.more = true;
                }
                continue;
            }
            let mut disks = self.views.iter_mut().flat_map(|view| &mut view.disks);
            if let Some(disk) = disks.find(|disk| disk.key == key) {
                disk.answers.push_back(answer);
            }
        }
        self.delivering = answers;
    }

    /// Answers of a disk of a view that are ready; none if it has gone.
    pub(crate) fn answers_of(&mut self, key: DiskKey) -> Option<&mut VecDeque<Answer>> {
        let (view, disk) = self.find_disk(key)?;
        Some(&mut self.views[view].disks[disk].answers)
    }

    /// What hosts see of a disk of a view; none if it has gone.
    pub(crate) fn geometry_of(&self, key: DiskKey) -> Option<Geometry> {
        let (view, disk) = self.find_disk(key)?;
        Some(self.views[view].disks[disk].geometry.clone())
    }

    /// Every change that was asked of the view's disks has been answered.
    pub(crate) fn is_settled(&self, key: DiskKey) -> bool {
        let view = self.find_disk(key).map(|(view, _)| &self.views[view]);
        let delta = view.and_then(|view| {
            let stream = self.streams.get(&view.stream)?;
            stream.deltas.iter().find(|delta| Some(delta.id) == view.delta)
        });
        delta.is_none_or(Delta::is_settled)
    }

    /// The view that a disk is of.
    pub(crate) fn view_name(&self, key: DiskKey) -> Option<&str> {
        self.find_disk(key).map(|(view, _)| self.views[view].name.as_str())
    }

    /// Tells what was written to a view from what is written to any other, also of the same name; 0 if it cannot be written.
    pub(crate) fn view_identity(&self, name: &str) -> u64 {
        let deltas = self.streams.values().flat_map(|stream| &stream.deltas);
        let timeline = deltas.map(|delta| &delta.view).find(|view| view.name == name).map(|view| view.timeline.0);
        timeline.map_or(0, |id| {
            id.chunks(8).fold(1, |sum, part| {
                part.iter().fold(sum, |sum: u64, byte| sum.wrapping_mul(0x100_0000_01b3) ^ u64::from(*byte))
            }) | 1
        })
    }

    fn find_disk(&self, key: DiskKey) -> Option<(usize, usize)> {
        self.views
            .iter()
            .enumerate()
            .find_map(|(at, view)| Some((at, view.disks.iter().position(|disk| disk.key == key)?)))
    }

    fn ask(&mut self, key: DiskKey, cookie: u64, request: Request, (view, disk): (usize, usize)) {
        // It may be asked after this round's turn, and nothing of it completes by itself.
        self.more |= !mutant!(ViewAskUnheard);
        let view = &mut self.views[view];
        let (slot, read_only) = (view.disks[disk].slot, view.disks[disk].geometry.read_only);
        let (id, stream, seq) = (view.id, view.stream, view.seq);
        let delta_id = view.delta;
        let delta = delta_id.and_then(|id| {
            let stream = self.streams.get_mut(&stream)?;
            stream.deltas.iter_mut().find(|delta| delta.id == id)
        });
        let answer = |result| Answer { cookie, result };
        let change = match request {
            Request::Read { offset, len } => {
                let (delta, view, shelf) = (delta_id, Some(id), None);
                self.reads.ask(ReadRequest { key, cookie, slot, seq, delta, view, shelf, stream, offset, len });
                return;
            }
            Request::ReadInto { .. } => {
                // What a view has comes out of many chunks: it says that it can do no such reads.
                view.disks[disk].answers.push_back(answer(Err(Errno::INVAL)));
                return;
            }
            Request::Flush => {
                match delta {
                    Some(delta) => delta.flush(key, cookie),
                    None => view.disks[disk].answers.push_back(answer(Ok(None))),
                }
                return;
            }
            Request::Write { offset, data, fua } => {
                let len = data.len as u64;
                Change { slot, key, cookie, kind: RecordKind::Write, offset, len, data: Some(data), fua }
            }
            Request::Zero { offset, len, unmap: _, fast_only: _, fua } => {
                Change { slot, key, cookie, kind: RecordKind::Zero, offset, len, data: None, fua }
            }
            Request::Discard { offset, len, fua } => {
                Change { slot, key, cookie, kind: RecordKind::Discard, offset, len, data: None, fua }
            }
        };
        match delta {
            Some(delta) if !read_only => delta.change(change),
            _ => view.disks[disk].answers.push_back(answer(Err(Errno(1)))), // EPERM
        }
    }

    fn status_at(&mut self, io: &mut I, (view, disk): (usize, usize), offset: u64) -> Result<Allocation, Errno> {
        let view = &self.views[view];
        let disk = &view.disks[disk];
        let end = disk.geometry.size.min(offset.saturating_add(STATUS_RANGE));
        if offset >= end {
            return Err(Errno::INVAL);
        }
        let stream = self.streams.get_mut(&view.stream).ok_or(Errno::IO)?;
        let mut cover = Cover::default();
        cover.start(offset, end);
        if let Some(delta) = view.delta.and_then(|id| stream.deltas.iter().find(|delta| delta.id == id)) {
            delta.journal.cover(&mut cover, disk.slot, u64::MAX);
        }
        if let Some(shelf) = stream.shelf_for(&view.name, view.seq) {
            shelf.journal.cover(&mut cover, disk.slot, u64::MAX);
        }
        stream.journal.cover(&mut cover, disk.slot, view.seq);
        let mut hole = None;
        let mut len = 0;
        for piece in cover.finish() {
            let (empty, known) = match piece.content {
                Content::Zero => (true, piece.len),
                Content::Data { .. } | Content::Unreadable => (false, piece.len),
                Content::Below => match stream.images.get(&disk.slot) {
                    Some(image) if piece.offset < image.size => {
                        let below = io.allocation(image.file, piece.offset)?;
                        (below.hole, below.len.clamp(1, piece.len))
                    }
                    _ => (true, piece.len),
                },
            };
            if *hole.get_or_insert(empty) != empty {
                break;
            }
            len += known;
            if known < piece.len {
                break;
            }
        }
        Ok(Allocation { len, hole: hole.unwrap_or(false) })
    }
}

fn exports_of(view: &View) -> Vec<Export> {
    let export = |disk: &Disk| Export {
        key: disk.key,
        name: format!("{}/{}", view.name, disk.name),
        description: format!("record {} of {}", view.seq, disk.name),
        geometry: disk.geometry.clone(),
    };
    view.disks.iter().map(export).collect()
}

/// A disk of a view, borrowed.
pub struct ViewDisk<'a, I: Io> {
    target: &'a mut Target<I>,
    key: DiskKey,
    at: (usize, usize),
}

impl<I: Io> Disks<I> for Target<I> {
    fn exports(&self) -> Vec<Export> {
        self.views.iter().flat_map(exports_of).collect()
    }

    fn disk(&mut self, key: DiskKey) -> Option<impl HostDisk<I> + '_> {
        let at = self.find_disk(key)?;
        Some(ViewDisk { target: self, key, at })
    }
}

impl<I: Io> HostDisk<I> for ViewDisk<'_, I> {
    fn geometry(&self) -> Geometry {
        self.target.views[self.at.0].disks[self.at.1].geometry.clone()
    }

    fn request(&mut self, io: &mut I, cookie: u64, request: Request) {
        self.target.ask(self.key, cookie, request, self.at);
        let _ = io;
    }

    fn answers(&mut self) -> &mut VecDeque<Answer> {
        &mut self.target.views[self.at.0].disks[self.at.1].answers
    }

    fn allocation(&mut self, io: &mut I, offset: u64) -> Result<Allocation, Errno> {
        self.target.status_at(io, self.at, offset)
    }
}
