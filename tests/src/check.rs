//! The checks: what both ends say of themselves, and restore points read through views.

use afterimage_dataplane::host::{DiskKey, HEADROOM, MAX_PART, Request};
use afterimage_dataplane::io::{Errno, Io, Nanos, Part};
use afterimage_dataplane::source::{GroupState, GroupStatus};
use afterimage_dataplane::target::{Damage, LostBlocks, PointInfo, StreamStatus, ViewConfig};
use afterimage_wire::ids::{DiskId, StreamId, TimelineId};
use afterimage_wire::record::{Record, RecordKind};
use afterimage_wire::timeline::TimelineKind;

use crate::history::{Change, Effect, HOLE};
use crate::run::Run;
use crate::stage::disk_id;

/// Longest time that a request to a view may take.
const PATIENCE: Nanos = 60_000_000_000;

/// What both ends say of themselves.
pub(crate) fn ends(run: &mut Run) -> Result<(), String> {
    let (group, stream) = (run.stage.group(), run.stage.stream());
    ends_as(run, group.as_ref(), stream.as_ref())
}

/// As [`ends`], of what they have just said.
pub(crate) fn ends_as(run: &mut Run, group: Option<&GroupStatus>, stream: Option<&StreamStatus>) -> Result<(), String> {
    if let Some(group) = group {
        if !group.incarnation.is_none()
            && run.stage.protected
            // Not before the life's own history has begun: the writer would be taken for the one before.
            && run.epochs.len() == run.stage.source_lives as usize
            && let Some(life) = run.epochs.len().checked_sub(1)
        {
            run.writers.entry(group.incarnation).or_insert(life);
        }
        let rising = [group.acked_seq, group.sent_seq, group.sealed_seq, group.captured_seq];
        if !rising.is_sorted() {
            return Err(format!("acked, sent, sealed, captured are not in order: {rising:?}"));
        }
    }
    let Some(stream) = stream else { return Ok(()) };
    if stream.durable_frame > stream.received_frame {
        return Err(format!("frame {} is durable, {} received", stream.durable_frame, stream.received_frame));
    }
    if let Some(acked) = group.and_then(|group| run.stage.acked_of(group))
        && acked > stream.durable_seq
        && !run.robbed
    {
        return Err(format!("record {acked} is acknowledged, {} durable", stream.durable_seq));
    }
    if let (Some(oldest), Some(newest)) = (stream.oldest, stream.newest)
        // The newest complete point may be kept below the floor, alone.
        && !((stream.floor <= oldest || oldest == newest) && oldest <= newest && newest <= stream.durable_seq)
    {
        let (floor, durable) = (stream.floor, stream.durable_seq);
        return Err(format!("floor {floor}, oldest {oldest}, newest {newest}, durable {durable} are not in order"));
    }
    if run.restarts > 0 {
        run.restarts = 0;
        run.recovered(stream.durable_seq, !stream.damage.is_empty())?;
    }
    run.tap.harmed = run.robbed.then_some((stream.incarnation, stream.durable_frame));
    follow(run, stream.timeline)?;
    if let Some(group) = group
        && !run.robbed
        && matches!(
            group.state,
            GroupState::Protected | GroupState::Syncing | GroupState::CatchingUp | GroupState::Unlinked(_)
        )
    {
        rpo(run, group.rpo_now, stream.newest)?;
    }
    if !run.robbed && run.stage.zero_loss() {
        zero_loss(run, stream.durable_seq)?;
    }
    Ok(())
}

/// Reads on in the journal; matches its writes with the host's, whose order must be the host's.
fn follow(run: &mut Run, timeline: TimelineId) -> Result<(), String> {
    let (world, node) = (run.stage.world.clone(), run.stage.target_node);
    run.tap.follow(&world, node, timeline).map_err(|w| w.0)?;
    let Some(epoch) = run.epochs.last_mut() else { return Ok(()) };
    let from = epoch.searched + 1;
    epoch.followed.resize(run.plan.setup.disks.len(), 0);
    for (seq, entry) in run.tap.entries.range(from..) {
        epoch.searched = *seq;
        if entry.record.kind != RecordKind::Write {
            continue;
        }
        let record = &entry.record;
        let changes = epoch.history.changes(usize::from(record.disk));
        let known = |change: &Change| change.effect != Effect::Write || epoch.matched.contains_key(&change.id);
        let followed = &mut epoch.followed[usize::from(record.disk)];
        *followed += changes[*followed..].iter().take_while(|change| known(change)).count();
        for change in &changes[*followed..] {
            let inside = change.offset >= record.offset && change.offset + change.len <= record.end();
            // A later record of the same block carries its bytes, too: it is the one numbered while the request ran.
            let meanwhile =
                record.mono_ns >= change.issued_at && change.answered_at.is_none_or(|at| record.mono_ns <= at);
            if !inside || !meanwhile || change.effect != Effect::Write || epoch.matched.contains_key(&change.id) {
                continue;
            }
            let at = (change.offset - record.offset) as usize;
            let bytes = &entry.payload[at..at + change.len as usize];
            if change.matches(change.offset, bytes) {
                epoch.matched.insert(change.id, *seq);
            }
        }
    }
    Ok(())
}

/// No key met a nonce twice; watched in builds that can play mutants.
pub(crate) fn nonces() -> Result<(), String> {
    #[cfg(feature = "mutants")]
    if let Some(what) = afterimage_dataplane::mutant::reused_nonce() {
        return Err(what);
    }
    Ok(())
}

/// If B was issued after A was answered, then seq(B) > seq(A): over all disks of the group.
pub(crate) fn order(run: &Run) -> Result<(), String> {
    for epoch in &run.epochs {
        let mut moments = Vec::new();
        for disk in 0..run.plan.setup.disks.len() {
            for change in epoch.history.changes(disk) {
                if let Some(seq) = epoch.matched.get(&change.id) {
                    moments.push((change.issued, false, *seq, change.id));
                    if let Some(answered) = change.answered {
                        moments.push((answered, true, *seq, change.id));
                    }
                }
            }
        }
        moments.sort_unstable();
        let mut newest = (0, 0);
        for (_, answered, seq, id) in moments {
            if answered {
                newest = newest.max((seq, id));
            } else if seq <= newest.0 {
                return Err(format!(
                    "request {id} is record {seq}, but was issued after request {}, record {}, was answered",
                    newest.1, newest.0
                ));
            }
        }
    }
    Ok(())
}

/// The reported RPO is no smaller than the age of the oldest write that is in no durable point.
fn rpo(run: &mut Run, reported: Nanos, newest: Option<u64>) -> Result<(), String> {
    let Some(newest) = newest else { return Ok(()) };
    let writer = run.tap.entries.get(&newest).and_then(|e| run.writers.get(&e.incarnation));
    if writer.is_none_or(|writer| writer + 1 != run.epochs.len()) {
        return Ok(());
    }
    let Some(epoch) = run.epochs.last_mut() else { return Ok(()) };
    let mut oldest: Option<(Nanos, u64)> = None;
    epoch.settled.resize(run.plan.setup.disks.len(), 0);
    for disk in 0..run.plan.setup.disks.len() {
        // What passed uncaptured is in a point once a synchronisation that ended later is.
        let synced = run.tap.synced(disk as u16, newest).unwrap_or(0);
        let changes = epoch.history.changes(disk);
        // In a point, for good: the newest complete one never goes back.
        let held = |change: &Change| {
            let nothing = change.effect != Effect::Write || change.failed;
            change.answered_at.is_some_and(|at| {
                nothing || at <= synced || epoch.matched.get(&change.id).is_some_and(|seq| *seq <= newest)
            })
        };
        while changes.get(epoch.settled[disk]).is_some_and(held) {
            epoch.settled[disk] += 1;
        }
        for change in changes[epoch.settled[disk]..].iter().filter(|change| !held(change)) {
            if let Some(at) = change.answered_at {
                oldest = Some(oldest.map_or((at, change.id), |o| o.min((at, change.id))));
            }
        }
    }
    let matched = |id: u64| run.epochs.last().and_then(|epoch| epoch.matched.get(&id).copied());
    if let Some((at, id)) = oldest
        && run.now().saturating_sub(at) > reported
    {
        let age = run.now() - at;
        return Err(format!(
            "request {id} was answered {age} ns ago and is in no point (record {:?}, newest point {newest}), but the \
             RPO is said to be {reported}",
            matched(id)
        ));
    }
    Ok(())
}

/// While the target says so, no host was answered a write that it does not hold.
fn zero_loss(run: &mut Run, durable: u64) -> Result<(), String> {
    let Some(epoch) = run.epochs.last() else { return Ok(()) };
    for disk in 0..run.plan.setup.disks.len() {
        let synced = run.tap.synced(disk as u16, durable).unwrap_or(0);
        let settled = epoch.settled.get(disk).copied().unwrap_or(0);
        for change in &epoch.history.changes(disk)[settled..] {
            let Some(at) = change.answered_at.filter(|_| change.effect == Effect::Write && !change.failed) else {
                continue;
            };
            if at > synced && epoch.matched.get(&change.id).is_none_or(|seq| *seq > durable) {
                let id = change.id;
                return Err(format!(
                    "the target says that nothing answered is missing; request {id} was answered at {at} ns and is not \
                     in its records up to {durable}"
                ));
            }
        }
    }
    Ok(())
}

/// Some restore points: the newest, the oldest, cuts, single writes.
pub(crate) fn choose(run: &mut Run, stream: StreamId, count: usize) -> Vec<u64> {
    let Some(status) = run.stage.stream() else { return Vec::new() };
    let Some(life) = run.stage.target.as_mut() else { return Vec::new() };
    let list = |points: Result<Vec<PointInfo>, _>| points.unwrap_or_default();
    let cuts = list(life.core.points(&mut life.io, stream, 0, 1 << 20, true));
    let all = list(life.core.points(&mut life.io, stream, 0, 1 << 20, false));
    let mut chosen: Vec<u64> = [status.oldest, status.newest].into_iter().flatten().collect();
    for from in [&cuts, &all, &all] {
        for _ in 0..count.div_ceil(3) {
            if !from.is_empty() {
                chosen.push(from[run.rng.below(from.len() as u64) as usize].seq);
            }
        }
    }
    chosen.sort_unstable();
    chosen.dedup();
    while chosen.len() > count {
        let out = run.rng.below(chosen.len() as u64) as usize;
        chosen.remove(out);
    }
    chosen
}

/// Opens a view; gives id, key and size of each disk.
pub(crate) fn open_view(run: &mut Run, config: &ViewConfig) -> Result<Vec<(DiskId, DiskKey, u64)>, String> {
    let life = run.stage.target.as_mut().ok_or("no target")?;
    let exports = life.core.open_view(&mut life.io, config.clone());
    let exports = exports.map_err(|e| format!("record {} cannot be opened: {e}", config.seq))?;
    run.stage.world.wake(run.stage.target_node);
    let mut out = Vec::new();
    for export in exports {
        let name = export.name.strip_prefix(&format!("{}/disk", config.name)).and_then(|n| n.parse::<usize>().ok());
        let disk = name.ok_or_else(|| format!("a view's export is called {}", export.name))?;
        out.push((disk_id(disk), export.key, export.geometry.size));
    }
    Ok(out)
}

/// A disk as a view shows it.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) disk: usize,
    pub(crate) bytes: Vec<u8>,
    /// Offsets of blocks of [`HOLE`] bytes that cannot be read.
    pub(crate) holes: Vec<u64>,
}

/// A point that is open in a view.
pub(crate) struct Opened {
    name: String,
    seq: u64,
    exports: Vec<(DiskId, DiskKey, u64)>,
    disks: Vec<usize>,
    /// Life of the target.
    life: u64,
}

/// Reads a point through a view and compares it: with what the journal's records make, and with what the host may
/// expect; everything answered before tick `floor` must be in it. Returns the disks that it holds.
pub(crate) fn point(run: &mut Run, seq: u64, floor: u64) -> Result<Vec<Image>, String> {
    match open_point(run, seq)? {
        Some(opened) => read_point(run, opened, floor),
        None => Ok(Vec::new()),
    }
}

/// Opens a point in a view; none if it holds no disk.
pub(crate) fn open_point(run: &mut Run, seq: u64) -> Result<Option<Opened>, String> {
    run.points += 1;
    run.note_losses();
    let name = format!("check-{}", run.points);
    let info = {
        let life = run.stage.target.as_mut().ok_or("no target")?;
        let found = life.core.points(&mut life.io, run.stage.stream, seq, 1, false);
        found.map_err(|e| e.to_string())?.into_iter().find(|p| p.seq == seq)
    };
    let Some(info) = info else {
        // Folded since it was chosen.
        let folded = run.stage.stream().is_none_or(|stream| stream.floor > seq);
        return if folded { Ok(None) } else { Err(format!("record {seq} is a point and is not listed")) };
    };
    let all = 0..run.plan.setup.disks.len();
    let disks: Vec<_> = all.clone().filter(|d| info.disks.contains(&disk_id(*d))).collect();
    let known: Vec<_> = all.filter(|d| run.tap.complete(*d as u16, seq)).collect();
    // What lost history holds fewer, never more.
    let fits = if run.robbed { disks.iter().all(|disk| known.contains(disk)) } else { disks == known };
    if !fits {
        return Err(format!("record {seq}: the target holds disks {disks:?}, by the journal it is {known:?}"));
    }
    if disks.is_empty() {
        return Ok(None);
    }
    let config = ViewConfig {
        name: name.clone(),
        stream: run.stage.stream,
        seq,
        disks: None,
        writable: false,
        kind: TimelineKind::View,
        reason: "checked".into(),
    };
    let life = run.stage.target_lives;
    let exports = open_view(run, &config)?;
    Ok(Some(Opened { name, seq, exports, disks, life }))
}

/// Reads what was opened and compares it; see [`point`]. Nothing if the target died over it.
pub(crate) fn read_point(run: &mut Run, opened: Opened, floor: u64) -> Result<Vec<Image>, String> {
    let Opened { name, seq, exports, disks, life } = opened;
    let lives = |run: &Run| run.stage.target_lives == life && run.stage.target.is_some() && run.stage.ready;
    if !lives(run) {
        return Ok(Vec::new());
    }
    // The records that the view rests on are read before they may be folded.
    ends(run)?;
    let (fails, mut damage) = (run.reads_fail, damage_of(run));
    let mut images = Vec::new();
    for (id, key, size) in exports.iter().copied() {
        let disk = (0..run.plan.setup.disks.len()).find(|d| disk_id(*d) == id).ok_or("an unknown disk")?;
        match read_disk(run, key, size)? {
            Some((bytes, holes)) => images.push(Image { disk, bytes, holes }),
            None => return Ok(Vec::new()),
        }
    }
    if !lives(run) {
        return Ok(Vec::new());
    }
    exports.iter().for_each(|(_, key, _)| run.stage.forget_view(*key));
    if let Some(life) = &mut run.stage.target {
        life.core.close_view(&mut life.io, &name, false).map_err(|e| format!("view {name}: {e}"))?;
        run.stage.world.wake(run.stage.target_node);
    }
    images.sort_by_key(|image| image.disk);
    if !images.iter().map(|image| image.disk).eq(disks.iter().copied()) {
        return Err(format!("record {seq}: the view does not present disks {disks:?}"));
    }
    damage.extend(damage_of(run));
    let excused = |disk: usize, from: u64, to: u64| {
        let lost = |block: &LostBlocks| {
            let needed = block.from <= seq && block.until.is_none_or(|until| seq < until);
            needed && block.slot == disk as u16 && block.offset < to && from < block.offset + block.len
        };
        fails || damage.iter().flat_map(|damage| &damage.blocks).any(lost)
    };
    compare(run, seq, floor, &mut images, excused)?;
    Ok(images)
}

/// What the target says that it cannot read, of which it knows what it was, where reads may fail.
fn damage_of(run: &Run) -> Vec<Damage> {
    if run.reads_failed { run.stage.stream().map(|stream| stream.damage).unwrap_or_default() } else { Vec::new() }
}

fn compare(
    run: &mut Run,
    seq: u64,
    floor: u64,
    images: &mut [Image],
    excused: impl Fn(usize, u64, u64) -> bool,
) -> Result<(), String> {
    if let Some(gap) = run.tap.gap(seq).filter(|_| !run.robbed) {
        return Err(format!("record {gap} was in no segment when it was looked at, although {seq} is a point"));
    }
    for Image { disk, bytes: image, holes } in images.iter_mut() {
        let (model, unreadable) = run.tap.show(*disk as u16, seq, image.len());
        for hole in holes.iter() {
            let end = (hole + HOLE).min(image.len() as u64);
            let excused = run.reads_fail || excused(*disk, *hole, end);
            if !run.robbed && !excused && !unreadable.iter().any(|(from, to)| from < &end && hole < to) {
                return Err(format!("record {seq}, disk {disk}: the block at {hole} cannot be read"));
            }
            image[*hole as usize..end as usize].copy_from_slice(&model[*hole as usize..end as usize]);
        }
        let image = &*image;
        let differ = (model != &image[..]).then(|| model.iter().zip(image).enumerate().filter(|(_, (a, b))| a != b));
        let differ = differ.and_then(|mut places| Some((places.next()?.0, 1 + places.count())));
        if let Some((at, bytes)) = differ {
            let over = |r: &&Record| {
                r.disk == *disk as u16 && r.kind.changes_disk() && r.offset <= at as u64 && (at as u64) < r.end()
            };
            let records = || run.tap.entries.values().map(|e| &e.record).filter(over);
            let last = records().rfind(|r| r.seq <= seq);
            // Which other place of the history the view shows there.
            let shown = records().find(|r| {
                let mut other = vec![0; image.len()];
                run.tap.apply(*disk as u16, 0, r.seq, &mut other, &mut Vec::new());
                other[at..(at + 16).min(image.len())] == image[at..(at + 16).min(image.len())]
            });
            let disk_now = run.source_disk(*disk);
            let source = if disk_now.get(at) == image.get(at) { "as the view has it" } else { "other than the view" };
            let status = run.stage.stream().map(|s| (s.floor, s.durable_seq, s.segments, s.folded_segments));
            return Err(format!(
                "record {seq}, disk {disk}: the view differs from the journal in {bytes} bytes from {at} on; last written \
                 by {last:?}, the view shows the state after {shown:?}; the source's disk is {source}; floor, newest, segments, folded: {status:?}"
            ));
        }
    }
    // Which life of the source the point is of. Its first records only say what follows: the state is still that of
    // the life before.
    let Some(entry) = run.tap.entries.get(&seq) else { return Ok(()) };
    let Some(life) = run.writers.get(&entry.incarnation) else { return Ok(()) };
    let opening = run
        .tap
        .entries
        .range(..=seq)
        .map(|(_, e)| e)
        .filter(|e| e.incarnation == entry.incarnation)
        .all(|e| matches!(e.record.kind, RecordKind::Join | RecordKind::SyncBegin | RecordKind::Cut));
    if opening {
        return Ok(());
    }
    let history = &run.epochs[*life].history;
    let views: Vec<_> = images.iter().map(|image| (image.disk, &image.bytes[..], &image.holes[..])).collect();
    let floor = if *life + 1 == run.epochs.len() { floor } else { 0 };
    history.judge_but(&views, floor).map_err(|v| format!("record {seq}: {v}"))
}

/// Reads a whole disk of a view, and says which blocks cannot be read; none if the target died over it.
#[allow(clippy::type_complexity)]
pub(crate) fn read_disk(run: &mut Run, key: DiskKey, size: u64) -> Result<Option<(Vec<u8>, Vec<u64>)>, String> {
    let (mut image, mut holes) = (Vec::new(), Vec::new());
    let mut whole = true;
    while (image.len() as u64) < size {
        let offset = image.len() as u64;
        let most = if whole { MAX_PART as u64 } else { HOLE };
        let len = (size - offset).min(most) as usize;
        match ask(run, key, Request::Read { offset, len })? {
            None => return Ok(None),
            Some(Ok(None)) => return Err(format!("a view's read of {len} bytes at {offset} gives no data")),
            Some(Ok(Some(bytes))) if image.is_empty() && bytes.len() as u64 == size => image = bytes,
            Some(Ok(Some(bytes))) => {
                image.reserve_exact(size as usize - image.len());
                image.extend_from_slice(&bytes);
            }
            Some(Err(_)) if whole => {
                // The same place again, in small pieces.
                whole = false;
                continue;
            }
            Some(Err(_)) => {
                holes.push(offset);
                image.resize(offset as usize + len, 0);
            }
        }
        whole |= (image.len() as u64).is_multiple_of(MAX_PART as u64);
    }
    Ok(Some((image, holes)))
}

/// Writes to a view.
pub(crate) fn write_view(run: &mut Run, key: DiskKey, offset: u64, data: &[u8]) -> Result<(), String> {
    let lead = HEADROOM + (offset % 4096) as usize;
    let life = run.stage.target.as_ref().ok_or("no target")?;
    let mut buf = life.io.pool().take(lead + data.len() + 4096).ok_or("no buffer for a write to a view")?;
    buf[lead..lead + data.len()].copy_from_slice(data);
    let part = Part { buf, at: lead, len: data.len() };
    done(ask(run, key, Request::Write { offset, data: part, fua: false })?)
}

/// Flushes a view.
pub(crate) fn flush_view(run: &mut Run, key: DiskKey) -> Result<(), String> {
    done(ask(run, key, Request::Flush)?)
}

/// What a view's disk answers: the bytes of a read, or an error. None if the target died over it.
type Answered = Option<Result<Option<Vec<u8>>, Errno>>;

fn done(answer: Answered) -> Result<(), String> {
    let answer = answer.ok_or("the target died")?;
    answer.map(|_| ()).map_err(|errno| format!("a view answers a write or a flush with {errno:?}"))
}

/// Asks a view's disk and waits.
fn ask(run: &mut Run, key: DiskKey, request: Request) -> Result<Answered, String> {
    let lives = run.stage.target_lives;
    let what = format!("{request:?}").chars().take(60).collect::<String>();
    if !run.stage.view_request(key, 7, request) {
        // A view gives way when the disk is full.
        if run.stage.lenient {
            return Ok(None);
        }
        return Err(format!("{key:?} is not on offer"));
    }
    let limit = run.stage.world.now() + PATIENCE;
    loop {
        if run.stage.target_lives != lives || run.stage.target.is_none() {
            return Ok(None);
        }
        if let Some((_, answer)) = run.stage.view_answers.pop_front() {
            return Ok(Some(answer.result));
        }
        if !run.stage.view_offered(key) {
            // A view gives way when the disk is full.
            return if run.stage.lenient { Ok(None) } else { Err(format!("{key:?} went while it was asked {what}")) };
        }
        if run.stage.world.now() >= limit {
            return Err(format!("a view does not answer {what}"));
        }
        run.wait(limit)?;
    }
}
