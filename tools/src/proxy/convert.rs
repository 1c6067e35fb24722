//! Between what the coordinator says (protobuf) and what the cores take, and back.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use afterimage_controlplane::hours::Hours;
use afterimage_dataplane::reverse::path_of;
use afterimage_dataplane::seal;
use afterimage_dataplane::source::{DiskConfig, GroupConfig, Pace};
use afterimage_dataplane::target::{Choice, PointInfo, StreamConfig, ViewConfig};
use afterimage_wire::ids::{DiskId, PolicyKeyId, StreamId, TimelineId};
use afterimage_wire::record::DiskInfo;
use afterimage_wire::timeline::TimelineKind;
use afterimage_wire::v1::{
    Compression, OpenView, Point, PointChoice, PolicyKey, SourceDisk, SourceGroup, TargetDisk, TargetStream, ViewKind,
    point_choice,
};

use jiff::tz::TimeZone;

use super::config::Listen;

/// What was said makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` is {value}: allowed is {allowed}")]
pub struct Senseless {
    /// Which field.
    pub field: &'static str,
    /// Its value.
    pub value: String,
    /// What it may be.
    pub allowed: &'static str,
}

fn senseless<T>(field: &'static str, value: impl fmt::Display, allowed: &'static str) -> Result<T, Senseless> {
    Err(Senseless { field, value: value.to_string(), allowed })
}

/// An id.
///
/// # Errors
/// It is none.
pub fn id<T: FromStr>(field: &'static str, text: &str) -> Result<T, Senseless> {
    text.parse().or_else(|_| senseless(field, format!("`{text}`"), "an id (a UUID)"))
}

/// The key of a stream, with those before it.
///
/// # Errors
/// Names the field.
pub fn policy_key(key: Option<&PolicyKey>) -> Result<seal::PolicyKey, Senseless> {
    let Some(key) = key else { return senseless("key", "missing", "a policy key") };
    let one = |key: &PolicyKey| {
        let bytes: [u8; 32] = key.key.as_slice().try_into().or_else(|_| senseless("key", "(secret)", "32 bytes"))?;
        Ok((id::<PolicyKeyId>("key.id", &key.id)?, bytes))
    };
    let (newest, bytes) = one(key)?;
    let older = key.older.iter().map(one).collect::<Result<Vec<_>, Senseless>>()?;
    Ok(seal::PolicyKey::new(newest, bytes).with_older(older))
}

fn slot(slot: u32) -> Result<u16, Senseless> {
    u16::try_from(slot).or_else(|_| senseless("slot", slot, "0 to 65535"))
}

/// Where a source keeps what it remembers of its disks; without a folder it stands beside the disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// Folder of the write-intent logs.
    pub intent: Option<PathBuf>,
    /// Folder of their witnesses.
    pub witness: Option<PathBuf>,
}

/// Its disks are disks of views, which are captured.
pub fn is_of_views(group: &SourceGroup) -> bool {
    group.disks.iter().any(|disk| !disk.view.is_empty())
}

/// A group as the source core takes it.
///
/// # Errors
/// Names the field.
pub fn group(group: &SourceGroup, places: &Places, trust_reboot: bool) -> Result<GroupConfig, Senseless> {
    let disks = group.disks.iter().map(|disk| {
        let disk = source_disk(disk, places)?;
        Ok(DiskConfig { trust_reboot: trust_reboot || disk.trust_reboot, ..disk })
    });
    let disks = disks.collect::<Result<_, _>>()?;
    Ok(GroupConfig {
        stream: id::<StreamId>("stream_uid", &group.stream_uid)?,
        name: group.name.clone(),
        disks,
        policy_key: policy_key(group.key.as_ref())?,
        cut_interval: group.cut_interval_ms.saturating_mul(1_000_000),
        compress: group.compression() != Compression::Off,
        lease: group.lease_ms.saturating_mul(1_000_000),
        sync_deadline: group.sync_deadline_ms.saturating_mul(1_000_000),
        left: group.left_slots.iter().map(|s| slot(*s)).collect::<Result<_, _>>()?,
    })
}

/// When frames of a group may leave at `now`.
///
/// # Errors
/// Names the field.
pub fn pace(group: &SourceGroup, now: jiff::Timestamp) -> Result<Pace, Senseless> {
    let hours = Hours::parse("allowed_hours", &group.allowed_hours)
        .or_else(|e| senseless("allowed_hours", e, "hours of a policy"))?;
    let zone = match group.time_zone.as_str() {
        "" => TimeZone::UTC,
        name => TimeZone::get(name).or_else(|_| senseless("time_zone", name, "a zone of the time zone database"))?,
    };
    let local = now.to_zoned(zone);
    let day = local.weekday().to_monday_zero_offset() as usize;
    let minute = (day * 24 + local.hour() as usize) * 60 + local.minute() as usize;
    Ok(Pace {
        rate: group.bandwidth_bytes_per_s,
        closed: !hours.is_open(minute),
        paused: group.paused,
        priority: u8::try_from(group.priority).unwrap_or(u8::MAX),
        rpo_target: group.rpo_target_us.saturating_mul(1000),
    })
}

fn source_disk(disk: &SourceDisk, places: &Places) -> Result<DiskConfig, Senseless> {
    let id = id::<DiskId>("disks.uid", &disk.uid)?;
    let captured = !disk.view.is_empty();
    if disk.path.starts_with('/') == captured {
        return senseless("disks.path", format!("`{}`", disk.path), "an absolute path, or empty for a disk of a view");
    }
    if captured && places.intent.is_none() {
        return senseless("disks.view", format!("`{}`", disk.view), "a view that is open at this proxy");
    }
    let place = |dir: &Option<PathBuf>, kind: &str| match dir {
        Some(dir) => dir.join(format!("{id}.{kind}")).to_string_lossy().into_owned(),
        None => format!("{}.{kind}", disk.path),
    };
    Ok(DiskConfig {
        id,
        slot: slot(disk.slot)?,
        name: disk.export_name.clone(),
        label: disk.name.clone(),
        path: if captured { path_of(&disk.view, &disk.name) } else { disk.path.clone() },
        log_path: place(&places.intent, "intent"),
        witness_path: place(&places.witness, "witness"),
        serial: disk.serial.clone(),
        block: disk.block_bytes,
        generation: disk.generation,
        read_only: false,
        // Nobody can have written to a view but through here.
        trust_reboot: captured,
    })
}

/// A stream as the target core takes it.
///
/// # Errors
/// Names the field.
pub fn stream(stream: &TargetStream) -> Result<StreamConfig, Senseless> {
    Ok(StreamConfig {
        stream: id::<StreamId>("stream_uid", &stream.stream_uid)?,
        name: stream.name.clone(),
        policy_key: policy_key(stream.key.as_ref())?,
        retention: stream.retention_s.saturating_mul(1_000_000_000),
        budget_bytes: stream.journal_budget_bytes,
        disks: stream.disks.iter().map(target_disk).collect::<Result<_, _>>()?,
    })
}

/// The images with which replicas of a stream begin, by disk.
///
/// # Errors
/// Names the field.
pub fn seeds(stream: &TargetStream) -> Result<Vec<(DiskId, String)>, Senseless> {
    let named = stream.disks.iter().filter(|disk| !disk.seed_path.is_empty());
    named.map(|disk| Ok((id::<DiskId>("disks.uid", &disk.uid)?, disk.seed_path.clone()))).collect()
}

/// What replicas of a stream are, in their place, by disk.
///
/// # Errors
/// Names the field.
pub fn bases(stream: &TargetStream) -> Result<Vec<(DiskId, String)>, Senseless> {
    let named = stream.disks.iter().filter(|disk| !disk.base_path.is_empty());
    let bases = named.map(|disk| {
        if !disk.base_path.starts_with('/') {
            return senseless("disks.base_path", format!("`{}`", disk.base_path), "an absolute path");
        }
        Ok((id::<DiskId>("disks.uid", &disk.uid)?, disk.base_path.clone()))
    });
    let bases: Vec<_> = bases.collect::<Result<_, _>>()?;
    if !bases.is_empty() && bases.len() != stream.disks.len() {
        return senseless("disks.base_path", "empty for some disks", "one for each disk, or for none");
    }
    Ok(bases)
}

fn target_disk(disk: &TargetDisk) -> Result<(DiskInfo, u64), Senseless> {
    let info = DiskInfo {
        slot: slot(disk.slot)?,
        id: id::<DiskId>("disks.uid", &disk.uid)?,
        size: disk.size_bytes,
        block: disk.block_bytes,
        physical_block: disk.physical_block_bytes,
        serial: disk.serial.clone(),
        name: disk.name.clone(),
    };
    Ok((info, disk.generation))
}

/// A view as the target core takes it.
///
/// # Errors
/// Names the field.
pub fn view(view: &OpenView) -> Result<ViewConfig, Senseless> {
    let disks: Vec<DiskId> = view.disk_uids.iter().map(|uid| id("disk_uids", uid)).collect::<Result<_, _>>()?;
    if view.view.is_empty() {
        return senseless("view", "empty", "a name");
    }
    Ok(ViewConfig {
        name: view.view.clone(),
        stream: id::<StreamId>("stream_uid", &view.stream_uid)?,
        seq: view.seq,
        disks: (!disks.is_empty()).then_some(disks),
        writable: view.writable,
        kind: match view.kind() {
            ViewKind::Failover => TimelineKind::Failover,
            ViewKind::Unspecified | ViewKind::Browse | ViewKind::Test => TimelineKind::View,
        },
        reason: view.reason.clone(),
    })
}

/// Which point.
///
/// # Errors
/// Nothing is chosen.
pub fn choice(choice: Option<&PointChoice>) -> Result<Choice, Senseless> {
    match choice.and_then(|c| c.at.as_ref()) {
        Some(point_choice::At::Latest(true)) => Ok(Choice::Latest),
        Some(point_choice::At::Cut(number)) => Ok(Choice::Cut(*number)),
        Some(point_choice::At::TimeNs(time)) => Ok(Choice::Time(*time)),
        Some(point_choice::At::Seq(seq)) => Ok(Choice::Seq(*seq)),
        Some(point_choice::At::Latest(false)) | None => {
            senseless("at", "nothing", "one of latest, cut, time_ns and seq")
        }
    }
}

/// A point as the coordinator takes it; it fills in the name.
pub fn point(point: &PointInfo, timeline: TimelineId) -> Point {
    let cut = point.cut.as_ref();
    Point {
        name: String::new(),
        seq: point.seq,
        cut: cut.map(|cut| cut.number),
        wall_ns: point.wall_ns,
        clock_synced: cut.is_some_and(|cut| cut.clock_synced),
        flush_clean: cut.is_some_and(|cut| cut.flush_clean),
        label: cut.map(|cut| cut.label.clone()).unwrap_or_default(),
        disks: point.disks.iter().map(ToString::to_string).collect(),
        damage: point.damage.clone().unwrap_or_default(),
        timeline: timeline.to_string(),
    }
}

/// The NBD URIs of an export, one for each way in.
pub fn uris(listens: &[Listen], export: &str) -> Vec<String> {
    let export = escape(export);
    listens
        .iter()
        .map(|listen| match listen {
            Listen::Unix(path) => format!("nbd+unix:///{export}?socket={}", escape(&path.to_string_lossy())),
            Listen::Tcp(address) => format!("nbd://{address}/{export}"),
        })
        .collect()
}

/// Percent-encodes what may not stand in a path or query.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => out.push(byte.into()),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_name_the_export_and_the_way_in() {
        let listens = ["unix:/run/a b.sock".parse().unwrap(), "tcp:127.0.0.1:10809".parse().unwrap()];
        assert_eq!(
            uris(&listens, "shop/data"),
            ["nbd+unix:///shop/data?socket=/run/a%20b.sock", "nbd://127.0.0.1:10809/shop/data"]
        );
    }

    #[test]
    fn a_group_without_a_key_is_refused_by_name() {
        let said = SourceGroup { stream_uid: StreamId::random().to_string(), ..SourceGroup::default() };
        assert_eq!(group(&said, &Places::default(), false).unwrap_err().field, "key");
    }

    #[test]
    fn hours_are_those_of_the_policy_s_zone() {
        let said = SourceGroup {
            allowed_hours: vec!["mon 00:00-01:00".into()],
            time_zone: "Europe/Vienna".into(),
            ..SourceGroup::default()
        };
        let closed = |at: &str| pace(&said, at.parse().unwrap()).unwrap().closed;
        // Monday 00:30 in Vienna: Sunday 23:30 in winter and 22:30 in summer.
        assert!(!closed("2026-01-04T23:30:00Z") && closed("2026-01-05T00:30:00Z"));
        assert!(!closed("2026-07-05T22:30:00Z") && closed("2026-07-05T23:30:00Z"));
        assert!(pace(&SourceGroup { paused: true, ..said.clone() }, jiff::Timestamp::UNIX_EPOCH).unwrap().paused);
        let odd = SourceGroup { time_zone: "Mars/Base".into(), ..said.clone() };
        assert_eq!(pace(&odd, jiff::Timestamp::UNIX_EPOCH).unwrap_err().field, "time_zone");
    }

    #[test]
    fn intent_logs_and_witnesses_stand_in_their_folders_or_beside_the_disk() {
        let uid = DiskId::random();
        let disk = SourceDisk { uid: uid.to_string(), path: "/d.raw".into(), ..SourceDisk::default() };
        assert_eq!(source_disk(&disk, &Places::default()).unwrap().log_path, "/d.raw.intent");
        assert_eq!(source_disk(&disk, &Places::default()).unwrap().witness_path, "/d.raw.witness");
        let places = Places { intent: Some("/s".into()), witness: Some("/w".into()) };
        let told = source_disk(&disk, &places).unwrap();
        assert_eq!((told.log_path, told.witness_path), (format!("/s/{uid}.intent"), format!("/w/{uid}.witness")));
    }

    #[test]
    fn choosing_nothing_is_refused() {
        assert!(choice(None).is_err());
        let none = PointChoice { at: Some(point_choice::At::Latest(false)) };
        assert!(choice(Some(&none)).is_err());
    }
}
