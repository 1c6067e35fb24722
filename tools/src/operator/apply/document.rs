//! What stands in the files of `afterimage apply`: policies, groups and their disks, plans, in TOML. A field is what the command
//! line calls it; one that is not known is refused with the line that it stands in.

use std::collections::BTreeMap;
use std::fmt;

use afterimage_wire::v1;
use serde::Deserialize;
use serde::de::{self, Deserializer};

use crate::operator::failure::{Failure, Kind};
use crate::operator::values::{duration_ns, size};
use crate::proxy::config::Size;

/// All files together.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// By name.
    #[serde(default)]
    pub policy: BTreeMap<String, PolicyText>,
    /// By name.
    #[serde(default)]
    pub group: BTreeMap<String, GroupText>,
    /// By name.
    #[serde(default)]
    pub plan: BTreeMap<String, PlanText>,
}

impl Document {
    /// Reads one file. `name` is what it is called in messages.
    ///
    /// # Errors
    /// The line, the field and what is allowed.
    pub fn parse(name: &str, text: &str) -> Result<Self, Failure> {
        toml::from_str(text).map_err(|error| {
            Failure::new(Kind::Usage, format!("document {name}"), error.to_string().trim_end())
                .hint("`afterimage apply --help` shows what may stand in it; it is TOML")
        })
    }

    /// Takes another file in.
    ///
    /// # Errors
    /// An object stands in both.
    pub fn add(&mut self, name: &str, other: Self) -> Result<(), Failure> {
        let twice = |what: String| {
            Failure::new(Kind::Usage, what, format!("stands in {name}, and in a file before it"))
                .hint("say each object once")
        };
        for (id, policy) in other.policy {
            if self.policy.insert(id.clone(), policy).is_some() {
                return Err(twice(format!("policy \"{id}\"")));
            }
        }
        for (id, group) in other.group {
            if self.group.insert(id.clone(), group).is_some() {
                return Err(twice(format!("group \"{id}\"")));
            }
        }
        for (id, plan) in other.plan {
            if self.plan.insert(id.clone(), plan).is_some() {
                return Err(twice(format!("plan \"{id}\"")));
            }
        }
        Ok(())
    }
}

/// A span of time: `"500ms"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(u64);

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        duration_ns(&String::deserialize(from)?).map(Self).map_err(de::Error::custom)
    }
}

/// A size: `"10GiB"`, or a number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a number of bytes, or a text such as \"10GiB\"")]
        enum Said {
            Number(u64),
            Text(String),
        }
        match Said::deserialize(from)? {
            Said::Number(bytes) => Ok(Self(bytes)),
            Said::Text(text) => size(&text).map(Self).map_err(de::Error::custom),
        }
    }
}

/// Compression.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compress {
    /// Where it pays.
    Auto,
    /// Never.
    Off,
}

/// A policy: what is not said stays as it is, or gets its default where the policy is new.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct PolicyText {
    description: Option<String>,
    rpo: Option<Span>,
    cut_interval: Option<Span>,
    retention: Option<Span>,
    journal_budget: Option<Bytes>,
    compression: Option<Compress>,
    warn_after: Option<Span>,
    error_after: Option<Span>,
    clear_after: Option<Span>,
    lease: Option<Span>,
    sync_deadline: Option<Span>,
    bandwidth: Option<Bytes>,
    hours: Option<Vec<String>>,
    time_zone: Option<String>,
    priority: Option<u32>,
    exclude: Option<Vec<String>>,
    same_site: Option<bool>,
}

/// A group; `policy` and `source` are needed where it is new, and without `target` the coordinator chooses one.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct GroupText {
    /// For people.
    pub description: Option<String>,
    /// Name of a policy.
    pub policy: Option<String>,
    /// Name of a proxy.
    pub source: Option<String>,
    /// Name of a proxy.
    pub target: Option<String>,
    /// By name.
    #[serde(default)]
    pub disk: BTreeMap<String, DiskText>,
}

/// A disk.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskText {
    /// On the source proxy's host.
    pub path: String,
    /// What it must have.
    pub size: Option<Bytes>,
    /// Logical block.
    pub block: Option<Bytes>,
    /// As hosts see it.
    pub serial: Option<String>,
    /// Of NBD.
    pub export: Option<String>,
    /// A raw image at the target with which the replica begins.
    pub seed: Option<String>,
}

/// A plan; `steps` are needed where it is new, and are all of them.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct PlanText {
    /// For people.
    pub description: Option<String>,
    /// Steps at once.
    pub parallel: Option<u32>,
    /// As they are typed for `plan create`.
    pub steps: Option<Vec<String>>,
}

/// A field's value, which can be compared and shown exactly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Nanoseconds.
    Span(u64),
    /// Bytes.
    Size(u64),
    /// A number.
    Number(u64),
    /// A text.
    Text(String),
    /// Texts.
    List(Vec<String>),
    /// Yes or no.
    Flag(bool),
}

impl fmt::Display for Value {
    /// As it can be written into a document.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u64, &str); 7] = [
            (86_400_000_000_000, "d"),
            (3_600_000_000_000, "h"),
            (60_000_000_000, "m"),
            (1_000_000_000, "s"),
            (1_000_000, "ms"),
            (1_000, "us"),
            (1, "ns"),
        ];
        match self {
            Self::Span(0) => f.write_str("0s"),
            Self::Span(ns) => {
                let (unit, word) = UNITS.iter().find(|(unit, _)| ns.is_multiple_of(*unit)).unwrap_or(&UNITS[6]);
                write!(f, "{}{word}", ns / unit)
            }
            Self::Size(bytes) => write!(f, "{}", Size(*bytes)),
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) if text.is_empty() => f.write_str("\"\""),
            Self::Text(text) => f.write_str(text),
            Self::List(list) => write!(f, "[{}]", list.join(", ")),
            Self::Flag(yes) => write!(f, "{yes}"),
        }
    }
}

/// A field of a policy: its name in a document and in the API, and how it is kept there.
pub struct Field {
    /// In a document.
    pub name: &'static str,
    /// In the API.
    pub path: &'static str,
    /// What the document says.
    said: fn(&PolicyText) -> Option<Value>,
    /// What there is.
    pub kept: fn(&v1::Policy) -> Value,
    /// Writes it. The unit that spans are kept in, ns, has been seen to divide it.
    pub set: fn(&mut v1::Policy, &Value),
    /// Spans are whole multiples of this, ns.
    unit: u64,
}

macro_rules! span {
    ($name:literal, $said:ident, $kept:ident, $unit:literal) => {
        Field {
            name: $name,
            path: stringify!($kept),
            said: |text| text.$said.map(|span| Value::Span(span.0)),
            kept: |policy| Value::Span(policy.$kept.unwrap_or(0).saturating_mul($unit)),
            set: |policy, value| {
                if let Value::Span(ns) = value {
                    policy.$kept = Some(ns / $unit);
                }
            },
            unit: $unit,
        }
    };
}

macro_rules! bytes {
    ($name:literal, $said:ident, $kept:ident) => {
        Field {
            name: $name,
            path: stringify!($kept),
            said: |text| text.$said.map(|size| Value::Size(size.0)),
            kept: |policy| Value::Size(policy.$kept.unwrap_or(0)),
            set: |policy, value| {
                if let Value::Size(bytes) = value {
                    policy.$kept = Some(*bytes);
                }
            },
            unit: 1,
        }
    };
}

macro_rules! text {
    ($name:literal, $field:ident) => {
        Field {
            name: $name,
            path: stringify!($field),
            said: |text| text.$field.clone().map(Value::Text),
            kept: |policy| Value::Text(policy.$field.clone()),
            set: |policy, value| {
                if let Value::Text(text) = value {
                    policy.$field.clone_from(text);
                }
            },
            unit: 1,
        }
    };
}

macro_rules! list {
    ($name:literal, $said:ident, $kept:ident) => {
        Field {
            name: $name,
            path: stringify!($kept),
            said: |text| text.$said.clone().map(Value::List),
            kept: |policy| Value::List(policy.$kept.clone()),
            set: |policy, value| {
                if let Value::List(list) = value {
                    policy.$kept.clone_from(list);
                }
            },
            unit: 1,
        }
    };
}

/// All fields of a policy, in the order in which they are shown.
pub const FIELDS: &[Field] = &[
    text!("description", description),
    span!("rpo", rpo, rpo_target_us, 1_000),
    span!("cut-interval", cut_interval, cut_interval_ms, 1_000_000),
    span!("retention", retention, retention_s, 1_000_000_000),
    bytes!("journal-budget", journal_budget, journal_budget_bytes),
    Field {
        name: "compression",
        path: "compression",
        said: |text| text.compression.map(|c| Value::Text(if c == Compress::Off { "off" } else { "auto" }.to_owned())),
        kept: |policy| Value::Text(crate::operator::documents::compression_word(policy.compression()).to_owned()),
        set: |policy, value| {
            let off = *value == Value::Text("off".to_owned());
            policy.set_compression(if off { v1::Compression::Off } else { v1::Compression::Auto });
        },
        unit: 1,
    },
    span!("warn-after", warn_after, warn_after_ms, 1_000_000),
    span!("error-after", error_after, error_after_ms, 1_000_000),
    span!("clear-after", clear_after, clear_after_ms, 1_000_000),
    span!("lease", lease, lease_ms, 1_000_000),
    span!("sync-deadline", sync_deadline, sync_deadline_ms, 1_000_000),
    bytes!("bandwidth", bandwidth, bandwidth_bytes_per_s),
    list!("hours", hours, allowed_hours),
    text!("time-zone", time_zone),
    Field {
        name: "priority",
        path: "priority",
        said: |text| text.priority.map(|number| Value::Number(number.into())),
        kept: |policy| Value::Number(policy.priority.unwrap_or(0).into()),
        set: |policy, value| {
            if let Value::Number(number) = value {
                policy.priority = u32::try_from(*number).ok();
            }
        },
        unit: 1,
    },
    list!("exclude", exclude, excluded_disks),
    Field {
        name: "same-site",
        path: "same_site",
        said: |text| text.same_site.map(Value::Flag),
        kept: |policy| Value::Flag(policy.same_site.unwrap_or(false)),
        set: |policy, value| policy.same_site = Some(*value == Value::Flag(true)),
        unit: 1,
    },
];

impl PolicyText {
    /// The fields that it says something about.
    ///
    /// # Errors
    /// A span that the API cannot keep exactly.
    pub fn said(&self, id: &str) -> Result<Vec<(&'static Field, Value)>, Failure> {
        let mut all = Vec::new();
        for field in FIELDS {
            let Some(value) = (field.said)(self) else { continue };
            if let Value::Span(ns) = value
                && !ns.is_multiple_of(field.unit)
            {
                let unit = Value::Span(field.unit);
                let message = format!("{} is {value}; allowed: whole multiples of {unit}", field.name);
                return Err(Failure::new(Kind::Usage, format!("policy \"{id}\""), message));
            }
            all.push((field, value));
        }
        Ok(all)
    }
}

impl DiskText {
    /// As the API takes it.
    ///
    /// # Errors
    /// A path that is not absolute, a block that is too large.
    pub fn disk(&self, group: &str, id: &str) -> Result<v1::Disk, Failure> {
        let refused =
            |message: String| Failure::new(Kind::Usage, format!("disk \"{id}\" of group \"{group}\""), message);
        if !self.path.starts_with('/') {
            return Err(refused(format!("path is \"{}\"; allowed: an absolute path at the source", self.path)));
        }
        let block = self.block.map_or(0, |block| block.0);
        Ok(v1::Disk {
            name: id.to_owned(),
            path: self.path.clone(),
            size_bytes: self.size.map_or(0, |size| size.0),
            block_bytes: u32::try_from(block).map_err(|_| refused(format!("block is {block}; allowed: up to 64K")))?,
            serial: self.serial.clone().unwrap_or_default(),
            export_name: self.export.clone().unwrap_or_default(),
            seed_path: self.seed.clone().unwrap_or_default(),
            ..Default::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_of_a_policy_is_read_set_and_compared() {
        let text = r#"
            [policy.gold]
            description = "d"
            rpo = "500ms"
            cut-interval = "2s"
            retention = "8h"
            journal-budget = "10GiB"
            compression = "off"
            warn-after = "1s"
            error-after = "2s"
            clear-after = "3s"
            lease = "4s"
            sync-deadline = "5s"
            bandwidth = 1048576
            hours = ["mon-fri 20:00-06:00"]
            time-zone = "Europe/Vienna"
            priority = 90
            exclude = ["swap*"]
            same-site = true
        "#;
        let document = Document::parse("x", text).unwrap();
        let said = document.policy["gold"].said("gold").unwrap();
        assert_eq!(said.len(), FIELDS.len());
        let mut policy = v1::Policy::default();
        for (field, value) in &said {
            assert_ne!((field.kept)(&policy), *value, "{}", field.name);
            (field.set)(&mut policy, value);
            assert_eq!((field.kept)(&policy), *value, "{}", field.name);
        }
        assert_eq!((policy.rpo_target_us, policy.retention_s), (Some(500_000), Some(28_800)));
    }

    #[test]
    fn what_is_not_known_is_refused_by_its_line() {
        for (text, word) in [
            ("[policy.gold]\nrpoo = '1s'", "rpoo"),
            ("[polcy.gold]", "polcy"),
            ("[policy.gold]\nrpo = '1'", "no duration"),
            ("[group.a.disk.d]\nsize = '1GB'\npath = '/d'", "no size"),
            ("[group.a.disk.d]\n", "path"),
        ] {
            let error = Document::parse("f.toml", text).unwrap_err();
            assert!(error.kind == Kind::Usage && error.message.contains(word), "{error}");
            assert!(error.object.contains("f.toml"), "{error}");
        }
        let rpo = Document::parse("x", "[policy.p]\ncut-interval = '1500us'").unwrap();
        assert!(rpo.policy["p"].said("p").is_err(), "half a millisecond is not kept");
    }

    #[test]
    fn an_object_stands_in_one_file() {
        let file = || Document::parse("a", "[policy.p]\nrpo = '1s'").unwrap();
        let mut all = file();
        assert!(all.add("b", file()).unwrap_err().object.contains("\"p\""));
    }

    #[test]
    fn values_are_shown_as_they_can_be_written() {
        assert_eq!(Value::Span(90_000_000_000).to_string(), "90s");
        assert_eq!(Value::Span(500_000_000).to_string(), "500ms");
        assert_eq!(Value::Span(14_400_000_000_000).to_string(), "4h");
        assert_eq!(Value::Size(10 << 30).to_string(), "10GiB");
        assert_eq!(Value::Size(4096).to_string(), "4096");
    }
}
