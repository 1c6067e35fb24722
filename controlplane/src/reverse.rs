//! How far a failback is, as the two proxies of a group report it. Pure.

use afterimage_wire::v1;

use crate::live::{Live, StreamLive};
use crate::model::Model;
use crate::objects::{Group, Way};

/// The newest complete point that a stream's keeper reports, if it holds every disk of the group: its number.
pub fn newest_of_all(model: &Model, group: &Group, stream: &StreamLive) -> Option<u64> {
    let newest = stream.target.as_ref()?.1.points.as_ref()?.newest.as_ref()?;
    let mut disks = model.disks_of(group).peekable();
    disks.peek()?;
    disks.all(|d| newest.disks.contains(&d.uid)).then_some(newest.seq)
}

/// What is missing before a stream of the group holds a complete point above `after`; none if nothing is.
pub fn missing(model: &Model, live: &Live, group: &Group, way: Way, after: u64) -> Option<String> {
    let (sender, keeper) = (group.sender(way), group.keeper(way));
    let nothing = StreamLive::default();
    let stream = group.stream(way).and_then(|uid| live.streams.get(uid)).unwrap_or(&nothing);
    let Some((_, report)) = &stream.source else { return Some(format!("\"{sender}\" has not reported it yet")) };
    if report.held && way == Way::Forth {
        return Some(format!("\"{sender}\" holds all I/O"));
    }
    if report.link() != v1::LinkState::Up {
        let detail = if report.link_detail.is_empty() { "not yet" } else { &report.link_detail };
        return Some(format!("\"{sender}\" is not connected to \"{keeper}\": {detail}"));
    }
    if let Some(sync) = &report.sync {
        let left = sync.left_ms.map(|ms| format!(", about {} s left", ms.div_ceil(1000))).unwrap_or_default();
        return Some(format!("synchronising, {} of {} bytes{left}", sync.done_bytes, sync.total_bytes));
    }
    match newest_of_all(model, group, stream) {
        Some(seq) if seq > after => None,
        _ => Some(format!("\"{keeper}\" holds no complete point of it yet")),
    }
}

/// Whether a group's source serves its disks again, as of its newest report; what it does instead otherwise.
pub fn started(model: &Model, live: &Live, group: &Group, told: u64) -> Result<(), String> {
    let Some(report) = newest(model, live, group, told)? else {
        return Err("it has not begun with them".to_owned());
    };
    if report.held {
        return Err("it holds all I/O".to_owned());
    }
    let served = |uid: &str| report.disks.iter().any(|d| d.disk_uid == uid && d.state == "serving");
    match model.disks_of(group).find(|d| !served(&d.uid)) {
        None => Ok(()),
        Some(disk) => {
            let state = report.disks.iter().find(|d| d.disk_uid == disk.uid).map_or("not reported", |d| &d.state);
            Err(format!("disk \"{}\" is {state}", disk.id))
        }
    }
}

/// Whether a group's source, which has been told to, holds all I/O, or does not serve its disks at all.
pub fn held(model: &Model, live: &Live, group: &Group, told: u64) -> Result<(), String> {
    match newest(model, live, group, told)? {
        None => Ok(()),
        Some(report) if report.held => Ok(()),
        Some(_) => Err("it has not said that it holds them".to_owned()),
    }
}

/// What the newest report of a group's source says of it, once the source has what it was told; none if it does not run it.
fn newest<'a>(
    model: &Model,
    live: &'a Live,
    group: &Group,
    told: u64,
) -> Result<Option<&'a v1::SourceGroupReport>, String> {
    let proxy = model.source_of(group).and_then(|p| live.proxies.get(&p.uid));
    let Some((proxy, heard)) = proxy.and_then(|p| Some((p, p.last_heard_ns?))) else {
        return Err("it has reported nothing".to_owned());
    };
    if proxy.observed_version < told {
        return Err("it has not got what it was told".to_owned());
    }
    if let Some(problem) = proxy.problems.iter().find(|p| p.stream_uid == group.uid) {
        return Err(problem.message.clone());
    }
    let report = live.streams.get(&group.uid).and_then(|s| s.source.as_ref());
    Ok(report.filter(|(at, _)| *at == heard).map(|(_, report)| report))
}

/// Whether both proxies have the reverse stream.
pub fn begun(model: &Model, live: &Live, group: &Group) -> Result<(), String> {
    let Some(uid) = group.stream(Way::Back) else { return Err("there is none".to_owned()) };
    let stream = live.streams.get(uid);
    let has = [
        (&group.target, model.target_of(group), stream.is_some_and(|s| s.source.is_some())),
        (&group.source, model.source_of(group), stream.is_some_and(|s| s.target.is_some())),
    ];
    let Some((id, proxy, _)) = has.into_iter().find(|(_, _, has)| !has) else { return Ok(()) };
    let problems = proxy.and_then(|p| live.proxies.get(&p.uid)).map(|p| p.problems.as_slice()).unwrap_or_default();
    let why = problems.iter().find(|p| p.stream_uid == uid).map_or("it has not reported it", |p| &p.message);
    Err(format!("\"{id}\": {why}"))
}

#[cfg(test)]
#[path = "reverse_tests.rs"]
mod tests;
