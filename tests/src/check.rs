//! The checks: what both ends say of themselves, and restore points read through views.

use afterimage_dataplane::host::{DiskKey, HEADROOM, MAX_PART, Request};
use afterimage_dataplane::io::{Io, Nanos, Part};
use afterimage_dataplane::source::GroupState;
use afterimage_dataplane::target::{PointInfo, ViewConfig};
use afterimage_wire::ids::{DiskId, StreamId};
use afterimage_wire::record::{Record, RecordKind};
use afterimage_wire::timeline::TimelineKind;

use crate::history::{Effect, pattern};
use crate::run::Run;
use crate::stage::disk_id;

/// Longest time that a request to a view may take.
const PATIENCE: Nanos = 60_000_000_000;

/// What both ends say of themselves.
pub(crate) fn ends(run: &mut Run) -> Result<(), String> {
    if let Some(owed) = run.stage.owed.take() {
        return Err(owed);
    }
    let group = run.stage.group();
    if let Some(group) = &group {
        if !group.incarnation.is_none()
            && run.stage.protected
            && let Some(life) = run.epochs.len().checked_sub(1)
        {
            run.writers.entry(group.incarnation).or_insert(life);
        }
        let rising = [group.acked_seq, group.sent_seq, group.sealed_seq, group.captured_seq];
        if !rising.is_sorted() {
            return Err(format!("acked, sent, sealed, captured are not in order: {rising:?}"));
        }
    }
    if let Some(stream) = run.stage.stream() {
        if stream.durable_frame > stream.received_frame {
            return Err(format!("frame {} is durable, {} received", stream.durable_frame, stream.received_frame));
        }
        if let Some(acked) = run.stage.acked()
            && acked > stream.durable_seq
        {
            return Err(format!("record {acked} is acknowledged, {} durable", stream.durable_seq));
        }
        if let (Some(oldest), Some(newest)) = (stream.oldest, stream.newest)
            && !(stream.floor <= oldest && oldest <= newest && newest <= stream.durable_seq)
        {
            let (floor, durable) = (stream.floor, stream.durable_seq);
            return Err(format!("floor {floor}, oldest {oldest}, newest {newest}, durable {durable} are not in order"));
        }
        if run.restarts > 0 {
            run.restarts = 0;
            run.recovered(stream.durable_seq)?;
        }
        follow(run)?;
        if let Some(group) = &group
            && group.state == GroupState::Protected
        {
            rpo(run, group.rpo_now, stream.newest)?;
        }
    }
    Ok(())
}

/// Reads on in the journal; matches its writes with the host's, whose order must be the host's.
fn follow(run: &mut Run) -> Result<(), String> {
    let Some(timeline) = run.stage.stream().map(|s| s.timeline) else { return Ok(()) };
    let (world, node) = (run.stage.world.clone(), run.stage.target_node);
    run.tap.follow(&world, node, timeline).map_err(|w| w.0)?;
    let Some(epoch) = run.epochs.last_mut() else { return Ok(()) };
    let from = epoch.searched + 1;
    for (seq, entry) in run.tap.entries.range(from..) {
        epoch.searched = *seq;
        if entry.record.kind != RecordKind::Write {
            continue;
        }
        let record = &entry.record;
        for change in epoch.history.changes(usize::from(record.disk)) {
            let inside = change.offset >= record.offset && change.offset + change.len <= record.end();
            // A later record of the same block carries its bytes, too: it is the one numbered while the request ran.
            let meanwhile =
                record.mono_ns >= change.issued_at && change.answered_at.is_none_or(|at| record.mono_ns <= at);
            if !inside || !meanwhile || change.effect != Effect::Write || epoch.matched.contains_key(&change.id) {
                continue;
            }
            let at = (change.offset - record.offset) as usize;
            let bytes = &entry.payload[at..at + change.len as usize];
            if bytes.iter().enumerate().all(|(i, b)| *b == pattern(change.id, change.offset + i as u64)) {
                epoch.matched.insert(change.id, *seq);
            }
        }
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
fn rpo(run: &Run, reported: Nanos, newest: Option<u64>) -> Result<(), String> {
    let (Some(epoch), Some(newest)) = (run.epochs.last(), newest) else { return Ok(()) };
    if !run.complete_in(run.epochs.len() - 1) {
        return Ok(());
    }
    let mut oldest: Option<(Nanos, u64)> = None;
    for disk in 0..run.plan.setup.disks.len() {
        // What passed uncaptured is in a point once a synchronisation that ended later is.
        let synced = run.tap.synced(disk as u16, newest).unwrap_or(0);
        for change in epoch.history.changes(disk).iter().filter(|c| c.effect == Effect::Write && !c.failed) {
            if let Some(at) = change.answered_at
                && at > synced
                && epoch.matched.get(&change.id).is_none_or(|seq| *seq > newest)
            {
                oldest = Some(oldest.map_or((at, change.id), |o| o.min((at, change.id))));
            }
        }
    }
    if let Some((at, id)) = oldest
        && run.now().saturating_sub(at) > reported
    {
        let age = run.now() - at;
        return Err(format!(
            "request {id} was answered {age} ns ago and is in no point (record {:?}, newest point {newest}), but the RPO is said to be {reported}",
            epoch.matched.get(&id)
        ));
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

/// Reads a point through a view and compares it: with what the journal's records make, and with what the host may
/// expect; everything answered before tick `floor` must be in it. Returns the disks that it holds.
pub(crate) fn point(run: &mut Run, seq: u64, floor: u64) -> Result<Vec<(usize, Vec<u8>)>, String> {
    let name = format!("check-{}", run.points);
    let info = {
        let life = run.stage.target.as_mut().ok_or("no target")?;
        let found = life.core.points(&mut life.io, run.stage.stream, seq, 1, false);
        found.map_err(|e| e.to_string())?.into_iter().find(|p| p.seq == seq)
    };
    let Some(info) = info else {
        return Err(format!("record {seq} is a point and is not listed"));
    };
    let disks: Vec<_> = (0..run.plan.setup.disks.len()).filter(|d| info.disks.contains(&disk_id(*d))).collect();
    let known: Vec<_> = (0..run.plan.setup.disks.len()).filter(|d| run.tap.complete(*d as u16, seq)).collect();
    if disks != known {
        return Err(format!("record {seq}: the target holds disks {disks:?}, by the journal it is {known:?}"));
    }
    if disks.is_empty() {
        return Ok(Vec::new());
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
    let lives = run.stage.target_lives;
    let exports = open_view(run, &config)?;
    let mut images = Vec::new();
    for (id, key, size) in exports {
        let disk = (0..run.plan.setup.disks.len()).find(|d| disk_id(*d) == id).ok_or("an unknown disk")?;
        match read_disk(run, key, size)? {
            Some(image) => images.push((disk, image)),
            None => return Ok(Vec::new()),
        }
    }
    if run.stage.target_lives == lives
        && let Some(life) = &mut run.stage.target
    {
        life.core.close_view(&mut life.io, &name, false).map_err(|e| format!("view {name}: {e}"))?;
        run.stage.world.wake(run.stage.target_node);
    }
    images.sort_by_key(|(disk, _)| *disk);
    if !images.iter().map(|(d, _)| *d).eq(disks.iter().copied()) {
        return Err(format!("record {seq}: the view does not present disks {disks:?}"));
    }
    // The newest points came after the last look.
    follow(run)?;
    compare(run, seq, floor, &images)?;
    run.points += 1;
    Ok(images)
}

fn compare(run: &Run, seq: u64, floor: u64, images: &[(usize, Vec<u8>)]) -> Result<(), String> {
    if let Some(gap) = run.tap.gap(seq) {
        return Err(format!("record {gap} was in no segment when it was looked at, although {seq} is a point"));
    }
    for (disk, image) in images {
        let mut model = vec![0; image.len()];
        run.tap.apply(*disk as u16, 0, seq, &mut model);
        if let Some(at) = model.iter().zip(image).position(|(a, b)| a != b) {
            let over = |r: &&Record| {
                r.disk == *disk as u16 && r.kind.changes_disk() && r.offset <= at as u64 && (at as u64) < r.end()
            };
            let records = || run.tap.entries.values().map(|e| &e.record).filter(over);
            let last = records().rfind(|r| r.seq <= seq);
            // Which other place of the history the view shows there.
            let shown = records().find(|r| {
                let mut other = vec![0; image.len()];
                run.tap.apply(*disk as u16, 0, r.seq, &mut other);
                other[at..(at + 16).min(image.len())] == image[at..(at + 16).min(image.len())]
            });
            let bytes = model.iter().zip(image).filter(|(a, b)| a != b).count();
            let status = run.stage.stream().map(|s| (s.floor, s.durable_seq, s.segments, s.folded_segments));
            return Err(format!(
                "record {seq}, disk {disk}: the view differs from the journal in {bytes} bytes from {at} on; last written \
                 by {last:?}, the view shows the state after {shown:?}; floor, newest, segments, folded: {status:?}"
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
    let views: Vec<(usize, &[u8])> = images.iter().map(|(d, i)| (*d, &i[..])).collect();
    let floor = if *life + 1 == run.epochs.len() { floor } else { 0 };
    history.judge(&views, floor).map_err(|v| format!("record {seq}: {v}"))
}

/// Reads a whole disk of a view; none if the target died over it.
pub(crate) fn read_disk(run: &mut Run, key: DiskKey, size: u64) -> Result<Option<Vec<u8>>, String> {
    let mut image = Vec::with_capacity(size as usize);
    while (image.len() as u64) < size {
        let offset = image.len() as u64;
        let len = (size - offset).min(MAX_PART as u64) as usize;
        match ask(run, key, Request::Read { offset, len })? {
            None => return Ok(None),
            Some(None) => return Err(format!("a view's read of {len} bytes at {offset} gives no data")),
            Some(Some(part)) => image.extend_from_slice(&part.buf[part.at..part.at + part.len]),
        }
    }
    run.stage.forget_view(key);
    Ok(Some(image))
}

/// Writes to a view.
pub(crate) fn write_view(run: &mut Run, key: DiskKey, offset: u64, data: &[u8]) -> Result<(), String> {
    let lead = HEADROOM + (offset % 4096) as usize;
    let life = run.stage.target.as_ref().ok_or("no target")?;
    let mut buf = life.io.pool().take(lead + data.len() + 4096).ok_or("no buffer for a write to a view")?;
    buf[lead..lead + data.len()].copy_from_slice(data);
    let part = Part { buf, at: lead, len: data.len() };
    ask(run, key, Request::Write { offset, data: part, fua: false })?.ok_or("the target died")?;
    Ok(())
}

/// Flushes a view.
pub(crate) fn flush_view(run: &mut Run, key: DiskKey) -> Result<(), String> {
    ask(run, key, Request::Flush)?.ok_or("the target died")?;
    Ok(())
}

/// Asks a view's disk and waits; none if the target died over it.
fn ask(run: &mut Run, key: DiskKey, request: Request) -> Result<Option<Option<Part>>, String> {
    let lives = run.stage.target_lives;
    let what = format!("{request:?}").chars().take(60).collect::<String>();
    if !run.stage.view_request(key, 7, request) {
        return Err(format!("{key:?} is not on offer"));
    }
    let limit = run.stage.world.now() + PATIENCE;
    loop {
        if run.stage.target_lives != lives || run.stage.target.is_none() {
            return Ok(None);
        }
        if let Some((_, answer)) = run.stage.view_answers.pop_front() {
            return match answer.result {
                Ok(part) => Ok(Some(part)),
                Err(error) => Err(format!("a view answers {what} with {error:?}")),
            };
        }
        if !run.step(limit)? {
            return Err(format!("a view does not answer {what}"));
        }
    }
}
