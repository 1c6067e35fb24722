//! Where a new group goes: a pure function of what is known of the targets. Groups that are placed already never move by
//! it.
//!
//! A target can take a group if it is connected, takes streams, is not the source, does not stand at the source's site
//! (unless the policy allows that), and has room: what is free, less its reserve, less what the groups that it keeps may
//! still take of their disks and journals. Of those that can, the least full afterwards is taken, by tenths of its file
//! system; among these the one whose sources send least, by powers of two; then the one with the fewest groups; then the
//! first by name.

use std::cmp::Reverse;

/// Candidates of which the reason says something.
const MAX_SAID: usize = 8;

/// The file system of a target's journals, as it reports it.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Room {
    /// Bytes.
    pub total: u64,
    /// Bytes.
    pub free: u64,
    /// Bytes that the target leaves free.
    pub reserve: u64,
    /// Journal of a group whose policy names no budget, bytes.
    pub default_budget: u64,
}

/// A proxy that may become the target.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Candidate {
    /// Id.
    pub id: String,
    /// Where it stands; empty if that is not known.
    pub site: String,
    /// It has a session.
    pub connected: bool,
    /// It takes streams.
    pub takes_streams: bool,
    /// It is being drained.
    pub draining: bool,
    /// None before its first report.
    pub room: Option<Room>,
    /// What the groups that it keeps may still take, bytes.
    pub promised: u64,
    /// Groups that it keeps.
    pub groups: u32,
    /// What their sources send, bytes a second.
    pub wire_per_s: u64,
}

/// What is to be placed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Need {
    /// Its disks, bytes.
    pub disks: u64,
    /// The journal that its policy allows, bytes; 0: what the target allows.
    pub budget: u64,
    /// Id of its source.
    pub source: String,
    /// Where its source stands; empty if that is not known.
    pub site: String,
    /// It may be at the site of its source.
    pub same_site: bool,
    /// Ids of proxies that it shall not go to.
    pub avoid: Vec<String>,
}

impl Need {
    /// What it may take at a target, bytes.
    pub fn bytes(&self, room: Room) -> u64 {
        self.disks.saturating_add(if self.budget > 0 { self.budget } else { room.default_budget })
    }
}

/// What is said of one candidate.
#[derive(Clone, PartialEq, Debug)]
pub struct Verdict {
    /// The candidate.
    pub candidate: Candidate,
    /// It can take the group.
    pub fits: bool,
    /// Why not; or what speaks for it.
    pub reason: String,
    /// What the group may take there, bytes.
    pub needed: u64,
}

/// Where it goes.
#[derive(Clone, PartialEq, Debug)]
pub struct Placement {
    /// Id of the target, if there is one.
    pub target: Option<String>,
    /// Why that one, or why none, with the numbers.
    pub reason: String,
    /// The best first, then those that do not fit, by name.
    pub verdicts: Vec<Verdict>,
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = (bytes.max(1).ilog2() / 10) as usize;
    if unit == 0 {
        return format!("{bytes} bytes");
    }
    format!("{:.1} {}", bytes as f64 / (1u64 << (10 * unit)) as f64, units[unit])
}

/// How full a target would be, of 1,000.
fn fill(room: Room, promised: u64, needed: u64) -> u64 {
    let used = u128::from(room.total.saturating_sub(room.free)) + u128::from(promised) + u128::from(needed);
    (used * 1000 / u128::from(room.total.max(1))) as u64
}

/// What a candidate has left for new groups, bytes.
fn left(room: Room, promised: u64) -> u64 {
    room.free.saturating_sub(room.reserve).saturating_sub(promised)
}

fn judge(need: &Need, candidate: &Candidate) -> (bool, String, u64) {
    let needed = candidate.room.map_or(need.disks, |room| need.bytes(room));
    let no = |why: String| (false, why, needed);
    if candidate.id == need.source {
        return no("it is the source".to_owned());
    }
    if need.avoid.contains(&candidate.id) {
        return no("it is to be left".to_owned());
    }
    if !candidate.takes_streams {
        return no("it takes no streams".to_owned());
    }
    if candidate.draining {
        return no("it is being drained".to_owned());
    }
    if !candidate.connected {
        return no("it is not connected".to_owned());
    }
    if !need.same_site && !need.site.is_empty() && candidate.site == need.site {
        return no(format!("it stands at the source's own site \"{}\"", need.site));
    }
    let Some(room) = candidate.room else { return no("it has not said yet how much room it has".to_owned()) };
    let left = left(room, candidate.promised);
    let numbers = format!(
        "{} needed, {} left: {} free, less a reserve of {} and {} for what it keeps",
        size(needed),
        size(left),
        size(room.free),
        size(room.reserve),
        size(candidate.promised)
    );
    if needed > left {
        return no(format!("short of {}: {numbers}", size(needed - left)));
    }
    let full = fill(room, candidate.promised, needed);
    let load = format!("{} groups, {} a second", candidate.groups, size(candidate.wire_per_s));
    (true, format!("{numbers}; {}.{}% full with it; {load}", full / 10, full % 10), needed)
}

/// Which target the group goes to. The order of the candidates does not matter.
pub fn place(need: &Need, candidates: &[Candidate]) -> Placement {
    let mut verdicts: Vec<Verdict> = candidates
        .iter()
        .map(|candidate| {
            let (fits, reason, needed) = judge(need, candidate);
            Verdict { candidate: candidate.clone(), fits, reason, needed }
        })
        .collect();
    verdicts.sort_by_cached_key(|verdict| {
        let c = &verdict.candidate;
        let full = c.room.map_or(u64::MAX, |room| fill(room, c.promised, verdict.needed));
        let key = (full / 100, c.wire_per_s.checked_ilog2().map_or(0, |log| log + 1), c.groups);
        (Reverse(verdict.fits), if verdict.fits { key } else { Default::default() }, c.id.clone())
    });
    let target = verdicts.first().filter(|v| v.fits).map(|v| v.candidate.id.clone());
    let said = verdicts.iter().filter(|v| v.candidate.takes_streams);
    let mut all: Vec<String> = said.map(|v| format!("\"{}\": {}", v.candidate.id, v.reason)).collect();
    let more = all.len().saturating_sub(MAX_SAID);
    all.truncate(MAX_SAID);
    if more > 0 {
        all.push(format!("{more} more"));
    }
    let reason = match (&target, all.is_empty()) {
        (Some(_), _) => all.join("; not "),
        (None, true) => "there is no proxy that takes streams".to_owned(),
        (None, false) => all.join("; "),
    };
    Placement { target, reason, verdicts }
}

#[cfg(test)]
#[path = "placement_tests.rs"]
mod tests;
