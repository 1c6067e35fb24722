//! `afterimage policy`: what is promised for the groups that name one.

use afterimage_wire::v1;
use clap::{Args, Subcommand, ValueEnum};
use prost_types::FieldMask;
use uuid::Uuid;

use super::documents::{self, compression_word, id};
use super::failure::{Failure, Kind};
use super::output::{fields, table, text};
use super::session::{Session, Which, every};
use super::values::{duration_ns, show_duration, show_size, show_time, size};

/// Verbs of `afterimage policy`.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Create a policy; what is not given has the default that is named.
    #[command(after_help = "Examples:\n  \
        afterimage policy create gold --rpo 500ms --retention 4h\n  \
        afterimage policy create night --hours 'mon-fri 20:00-06:00' --time-zone Europe/Vienna\n  \
        afterimage policy create slow-link --cut-interval 5s --journal-budget 200GiB --rpo 1m")]
    Create {
        /// The policy's name: a-z, 0-9 and "-", at most 63 characters.
        policy: String,
        #[command(flatten)]
        promise: Promise,
        /// Check only.
        #[arg(long)]
        dry_run: bool,
    },
    /// List the policies.
    #[command(after_help = "Examples:\n  \
        afterimage policy list\n  \
        afterimage policy list --filter 'rpo_target_us < 1000000 AND description:web'")]
    List {
        #[command(flatten)]
        which: Which,
    },
    /// Show one policy.
    Show {
        /// The policy's name.
        policy: String,
    },
    /// Change what is given; the rest stays. Proxies take it over while they go on.
    #[command(after_help = "Examples:\n  afterimage policy update gold --retention 8h")]
    Update {
        /// The policy's name.
        policy: String,
        #[command(flatten)]
        promise: Promise,
        /// Check only.
        #[arg(long)]
        dry_run: bool,
    },
    /// Delete a policy that no group names.
    Delete {
        /// The policy's name.
        policy: String,
    },
}

/// The fields of a policy.
#[derive(Args, Debug, Default)]
pub struct Promise {
    /// RPO to be kept, such as 500ms [default: 1s].
    #[arg(long, visible_alias = "rpo-target", value_name = "DURATION", value_parser = duration_ns)]
    rpo: Option<u64>,
    /// Time between two cuts, at least 10ms [default: 1s].
    #[arg(long, value_name = "DURATION", value_parser = duration_ns)]
    cut_interval: Option<u64>,
    /// How long every single write stays a restore point [default: 4h].
    #[arg(long, value_name = "DURATION", value_parser = duration_ns)]
    retention: Option<u64>,
    /// Most room a group's journal takes, such as 100GiB; history shortens at it [default: what the target allows].
    #[arg(long, value_name = "SIZE", value_parser = size)]
    journal_budget: Option<u64>,
    /// Compression of what is shipped [default: auto].
    #[arg(long, value_name = "WHEN")]
    compression: Option<Compress>,
    /// Warn when the RPO has been above its target for this long [default: 5s].
    #[arg(long, value_name = "DURATION", value_parser = duration_ns)]
    warn_after: Option<u64>,
    /// Make that an error after this long [default: 1m].
    #[arg(long, value_name = "DURATION", value_parser = duration_ns)]
    error_after: Option<u64>,
    /// Take it back when the RPO has been within its target for this long [default: 5s].
    #[arg(long, value_name = "DURATION", value_parser = duration_ns)]
    clear_after: Option<u64>,
    /// The source holds all I/O after this long without a word from target or coordinator, so that a failover needs no
    /// confirmation; at least 3s; 0s for none [default: 0s].
    #[arg(long, value_name = "DURATION", value_parser = duration_ns)]
    lease: Option<u64>,
    /// Synchronous: a write is answered when the target has it, or after this long (200ms to 1m); 0s for asynchronous
    /// [default: 0s].
    #[arg(long, value_name = "DURATION", value_parser = duration_ns)]
    sync_deadline: Option<u64>,
    /// Most that is sent a second for a group, such as 10MiB; 0 for no bound [default: 0].
    #[arg(long, value_name = "SIZE", value_parser = size)]
    bandwidth: Option<u64>,
    /// When the source may send, such as "mon-fri 20:00-06:00"; may be given many times; "" for always. A failover does
    /// not wait for it [default: always].
    #[arg(long, value_name = "[DAYS] HH:MM-HH:MM")]
    hours: Vec<String>,
    /// Zone of the hours, such as Europe/Vienna [default: UTC].
    #[arg(long, value_name = "ZONE")]
    time_zone: Option<String>,
    /// Groups with a higher one go first when their link is short, 0 to 100 [default: 50].
    #[arg(long, value_name = "NUMBER")]
    priority: Option<u32>,
    /// Disks that are never replicated, by id or path, with * for anything; may be given many times; "" for none.
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<String>,
    /// Groups may be placed at the site of their source [default: false].
    #[arg(long, value_name = "BOOL")]
    same_site: Option<bool>,
    /// For people.
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
}

#[derive(ValueEnum, Debug, Clone, Copy)]
enum Compress {
    /// Where it pays.
    Auto,
    /// Never.
    Off,
}

impl Promise {
    /// Writes what was given over what is there.
    fn over(&self, policy: &mut v1::Policy) -> Result<(), Failure> {
        if let Some(ns) = self.rpo {
            policy.rpo_target_us = Some(whole(ns, 1_000, "--rpo", "microseconds")?);
        }
        if let Some(ns) = self.cut_interval {
            policy.cut_interval_ms = Some(whole(ns, 1_000_000, "--cut-interval", "milliseconds")?);
        }
        if let Some(ns) = self.retention {
            policy.retention_s = Some(whole(ns, 1_000_000_000, "--retention", "seconds")?);
        }
        if let Some(ns) = self.warn_after {
            policy.warn_after_ms = Some(whole(ns, 1_000_000, "--warn-after", "milliseconds")?);
        }
        if let Some(ns) = self.error_after {
            policy.error_after_ms = Some(whole(ns, 1_000_000, "--error-after", "milliseconds")?);
        }
        if let Some(ns) = self.clear_after {
            policy.clear_after_ms = Some(whole(ns, 1_000_000, "--clear-after", "milliseconds")?);
        }
        if let Some(ns) = self.lease {
            policy.lease_ms = Some(whole(ns, 1_000_000, "--lease", "milliseconds")?);
        }
        if let Some(ns) = self.sync_deadline {
            policy.sync_deadline_ms = Some(whole(ns, 1_000_000, "--sync-deadline", "milliseconds")?);
        }
        if self.bandwidth.is_some() {
            policy.bandwidth_bytes_per_s = self.bandwidth;
        }
        let given = |list: &[String]| list.iter().filter(|text| !text.is_empty()).cloned().collect();
        if !self.hours.is_empty() {
            policy.allowed_hours = given(&self.hours);
        }
        if !self.exclude.is_empty() {
            policy.excluded_disks = given(&self.exclude);
        }
        if let Some(zone) = &self.time_zone {
            policy.time_zone.clone_from(zone);
        }
        if self.same_site.is_some() {
            policy.same_site = self.same_site;
        }
        if self.priority.is_some() {
            policy.priority = self.priority;
        }
        if self.journal_budget.is_some() {
            policy.journal_budget_bytes = self.journal_budget;
        }
        match self.compression {
            Some(Compress::Auto) => policy.set_compression(v1::Compression::Auto),
            Some(Compress::Off) => policy.set_compression(v1::Compression::Off),
            None => {}
        }
        if let Some(description) = &self.description {
            policy.description.clone_from(description);
        }
        Ok(())
    }

    /// The fields that were given.
    fn mask(&self) -> FieldMask {
        let given = [
            ("rpo_target_us", self.rpo.is_some()),
            ("cut_interval_ms", self.cut_interval.is_some()),
            ("retention_s", self.retention.is_some()),
            ("journal_budget_bytes", self.journal_budget.is_some()),
            ("compression", self.compression.is_some()),
            ("warn_after_ms", self.warn_after.is_some()),
            ("error_after_ms", self.error_after.is_some()),
            ("clear_after_ms", self.clear_after.is_some()),
            ("lease_ms", self.lease.is_some()),
            ("sync_deadline_ms", self.sync_deadline.is_some()),
            ("bandwidth_bytes_per_s", self.bandwidth.is_some()),
            ("allowed_hours", !self.hours.is_empty()),
            ("time_zone", self.time_zone.is_some()),
            ("priority", self.priority.is_some()),
            ("excluded_disks", !self.exclude.is_empty()),
            ("same_site", self.same_site.is_some()),
            ("description", self.description.is_some()),
        ];
        FieldMask { paths: given.into_iter().filter(|(_, is)| *is).map(|(field, _)| field.to_owned()).collect() }
    }
}

/// A duration in the unit that the field is kept in; refused rather than rounded.
fn whole(ns: u64, unit: u64, option: &str, units: &str) -> Result<u64, Failure> {
    if ns.is_multiple_of(unit) {
        Ok(ns / unit)
    } else {
        Err(Failure::usage(format!("{option}: {} is not a whole number of {units}", show_duration(ns))))
    }
}

/// Runs a verb.
pub async fn run(verb: Verb, session: &Session) -> Result<(), Failure> {
    let out = session.out;
    match verb {
        Verb::Create { policy, promise, dry_run } => {
            let mut wanted = v1::Policy::default();
            promise.over(&mut wanted)?;
            let request = v1::CreatePolicyRequest {
                parent: session.tenant(),
                policy_id: policy.clone(),
                policy: Some(wanted),
                validate_only: dry_run,
                request_id: Uuid::new_v4().to_string(),
            };
            let made = session.ask(object(&policy), session.policies().create_policy(request)).await?;
            out.show(&documents::policy(&made), || shown(&made));
        }
        Verb::List { which } => {
            let request =
                v1::ListPoliciesRequest { parent: session.tenant(), filter: which.filter, ..Default::default() };
            let policies: Vec<v1::Policy> = every!(session, "policies", policies.list_policies(request).policies);
            let document = policies.iter().map(documents::policy).collect::<Vec<_>>();
            out.show(&serde_json::json!({"policies": document}), || listed(&policies));
        }
        Verb::Show { policy } => {
            let found = get(session, &policy).await?;
            out.show(&documents::policy(&found), || shown(&found));
        }
        Verb::Update { policy, promise, dry_run } => {
            if promise.mask().paths.is_empty() {
                return Err(Failure::new(Kind::Usage, object(&policy), "nothing to change was given")
                    .hint("name what changes, for instance --retention 8h; see afterimage policy update --help"));
            }
            let mut wanted = get(session, &policy).await?;
            promise.over(&mut wanted)?;
            let request = v1::UpdatePolicyRequest {
                policy: Some(wanted),
                validate_only: dry_run,
                update_mask: Some(promise.mask()),
                request_id: Uuid::new_v4().to_string(),
            };
            let made = session.ask(object(&policy), session.policies().update_policy(request)).await?;
            out.show(&documents::policy(&made), || shown(&made));
        }
        Verb::Delete { policy } => {
            let found = get(session, &policy).await?;
            let request = v1::DeletePolicyRequest { name: found.name, etag: found.etag, ..Default::default() };
            session.ask(object(&policy), session.policies().delete_policy(request)).await?;
            out.show(&serde_json::json!({"deleted": {"policy": policy}}), || format!("policy {policy} deleted"));
        }
    }
    Ok(())
}

async fn get(session: &Session, policy: &str) -> Result<v1::Policy, Failure> {
    let request = v1::GetPolicyRequest { name: session.policy(policy) };
    session.ask(object(policy), session.policies().get_policy(request)).await
}

fn object(policy: &str) -> String {
    format!("policy \"{policy}\"")
}

fn ms(value: Option<u64>) -> String {
    value.map_or_else(String::new, |ms| show_duration(ms.saturating_mul(1_000_000)))
}

fn or_none(value: Option<u64>) -> String {
    match value {
        None | Some(0) => "no".to_owned(),
        some => ms(some),
    }
}

fn budget(value: Option<u64>) -> String {
    match value {
        None | Some(0) => "what the target allows".to_owned(),
        Some(bytes) => show_size(bytes),
    }
}

fn bandwidth(policy: &v1::Policy) -> String {
    match policy.bandwidth_bytes_per_s {
        None | Some(0) => "no bound".to_owned(),
        Some(bytes) => format!("{}/s", show_size(bytes)),
    }
}

fn hours(policy: &v1::Policy) -> String {
    match policy.allowed_hours.join(", ") {
        hours if hours.is_empty() => "always".to_owned(),
        hours => format!("{hours} ({})", policy.time_zone),
    }
}

fn rpo(policy: &v1::Policy) -> String {
    policy.rpo_target_us.map_or_else(String::new, |us| show_duration(us.saturating_mul(1_000)))
}

fn retention(policy: &v1::Policy) -> String {
    policy.retention_s.map_or_else(String::new, |s| show_duration(s.saturating_mul(1_000_000_000)))
}

fn listed(policies: &[v1::Policy]) -> String {
    if policies.is_empty() {
        return "no policies; create one: afterimage policy create gold".to_owned();
    }
    table(
        &["POLICY", ">RPO TARGET", ">CUT EVERY", ">RETENTION", ">JOURNAL BUDGET", "COMPRESSION"],
        policies.iter().map(|policy| {
            vec![
                text(id(&policy.name)),
                text(rpo(policy)),
                text(ms(policy.cut_interval_ms)),
                text(retention(policy)),
                text(budget(policy.journal_budget_bytes)),
                text(compression_word(policy.compression())),
            ]
        }),
    )
}

fn shown(policy: &v1::Policy) -> String {
    fields(&[
        ("policy", id(&policy.name).to_owned()),
        ("description", policy.description.clone()),
        ("RPO target", rpo(policy)),
        ("warn after", ms(policy.warn_after_ms)),
        ("error after", ms(policy.error_after_ms)),
        ("clear after", ms(policy.clear_after_ms)),
        ("cut every", ms(policy.cut_interval_ms)),
        ("retention", retention(policy)),
        ("journal budget", budget(policy.journal_budget_bytes)),
        ("compression", compression_word(policy.compression()).to_owned()),
        ("lease", or_none(policy.lease_ms)),
        ("synchronous", or_none(policy.sync_deadline_ms)),
        ("bandwidth", bandwidth(policy)),
        ("hours", hours(policy)),
        ("priority", policy.priority.map_or_else(String::new, |p| p.to_string())),
        ("excluded disks", policy.excluded_disks.join(" ")),
        ("warnings", policy.warnings.join("; ")),
        ("uid", policy.uid.clone()),
        ("version", policy.version.to_string()),
        ("created", show_time(policy.create_time_ns)),
        ("updated", show_time(policy.update_time_ns)),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_given_is_written_over() {
        let mut policy = v1::Policy { retention_s: Some(60), cut_interval_ms: Some(500), ..Default::default() };
        let promise = Promise { retention: Some(7_200_000_000_000), ..Default::default() };
        promise.over(&mut policy).unwrap();
        assert_eq!(policy.retention_s, Some(7200));
        assert_eq!(policy.cut_interval_ms, Some(500));
    }

    #[test]
    fn a_duration_is_refused_rather_than_rounded() {
        let promise = Promise { retention: Some(1_500_000_000), ..Default::default() };
        let refused = promise.over(&mut v1::Policy::default()).unwrap_err();
        assert_eq!(refused.kind, Kind::Usage);
        assert!(refused.message.contains("--retention") && refused.message.contains("1.50 s"), "{refused}");
    }

    #[test]
    fn a_table_of_policies_fits_100_columns() {
        let policy = v1::Policy {
            name: format!("tenants/default/policies/{}", "p".repeat(63)),
            rpo_target_us: Some(86_400_000_000),
            cut_interval_ms: Some(3_599_999),
            retention_s: Some(2_678_400),
            journal_budget_bytes: Some(0),
            ..Default::default()
        };
        assert!(listed(&[policy]).lines().all(|line| line.chars().count() <= 100));
    }
}
