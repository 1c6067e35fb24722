//! `afterimage placement`: where groups go that name no target.

use afterimage_wire::v1;
use clap::Subcommand;

use super::documents::{self, id};
use super::failure::{Failure, Kind};
use super::output::{Mood, state, table, text};
use super::session::Session;
use super::values::{show_size, size};

/// Verbs of `afterimage placement`.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Say where a group would be placed now, and what each target says for and against. Changes nothing.
    #[command(after_help = "Examples:\n  \
        afterimage placement explain shop                                     if it were created now\n  \
        afterimage placement explain --source src --policy gold --size 2TiB   one that might be\n\n\
        A target needs room for the disks and the journal, and stands at another site than the source unless\n\
        the policy says --same-site true. Of those that fit, the least full is taken, then the least busy.\n\
        Exit codes: 0 it fits somewhere, 1 it fits nowhere.")]
    Explain {
        /// A group that exists.
        #[arg(required_unless_present_all = ["source", "policy", "size"])]
        group: Option<String>,
        /// The proxy that would stand at the disks.
        #[arg(long, value_name = "PROXY", conflicts_with = "group")]
        source: Option<String>,
        /// The policy that it would have.
        #[arg(long, conflicts_with = "group")]
        policy: Option<String>,
        /// The size of all its disks together, such as 500GiB.
        #[arg(long, value_name = "SIZE", value_parser = size, conflicts_with = "group")]
        size: Option<u64>,
    },
}

/// Runs a verb.
pub async fn run(verb: Verb, session: &Session) -> Result<(), Failure> {
    let Verb::Explain { group, source, policy, size } = verb;
    let object = group.as_deref().map_or_else(|| "this group".to_owned(), super::group::object);
    let request = v1::ExplainPlacementRequest {
        parent: session.tenant(),
        group: group.map(|group| session.group(&group)).unwrap_or_default(),
        source: source.map(|source| session.proxy(&source)).unwrap_or_default(),
        policy: policy.map(|policy| session.policy(&policy)).unwrap_or_default(),
        size_bytes: size.unwrap_or_default(),
    };
    let found = session.ask(&object, session.groups().explain_placement(request)).await?;
    session.out.show(&documents::placement(&found), || shown(&found));
    if found.target.is_empty() {
        return Err(Failure::new(Kind::Failed, object, "it fits nowhere").hint("make room, or add a target"));
    }
    Ok(())
}

fn shown(placement: &v1::Placement) -> String {
    if placement.candidates.is_empty() {
        return format!("{}\n", placement.reason);
    }
    let mut shown = table(
        &["TARGET", "", "SITE", ">FREE", ">PROMISED", ">NEEDED", ">GROUPS"],
        placement.candidates.iter().map(|c| {
            let (word, mood) = match (c.proxy == placement.target, c.fits) {
                (true, _) => ("chosen", Mood::Good),
                (false, true) => ("fits", Mood::Plain),
                (false, false) => ("no", Mood::Care),
            };
            vec![
                text(id(&c.proxy)),
                state(word, mood),
                text(&c.site),
                text(c.room.map(|room| show_size(room.free_bytes)).unwrap_or_default()),
                text(show_size(c.promised_bytes)),
                text(show_size(c.needed_bytes)),
                text(c.groups.to_string()),
            ]
        }),
    );
    shown += "\n";
    shown += &table(
        &["TARGET", "WHY"],
        placement.candidates.iter().map(|c| vec![text(id(&c.proxy)), text(c.reason.as_str())]),
    );
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_candidates_fits_100_columns_and_says_why() {
        let room = v1::TargetRoom { total_bytes: 1 << 50, free_bytes: 1 << 49, ..Default::default() };
        let candidate = |proxy: char, fits| v1::PlacementCandidate {
            proxy: format!("tenants/default/proxies/{}", proxy.to_string().repeat(63)),
            fits,
            reason: format!("short of 3.0 GiB: {}", "what it has is promised to others ".repeat(6)),
            site: "s".repeat(63),
            room: Some(room),
            ..Default::default()
        };
        let placement = v1::Placement {
            target: candidate('a', true).proxy,
            candidates: vec![candidate('a', true), candidate('b', false)],
            ..Default::default()
        };
        let text = shown(&placement);
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        assert!(text.contains("chosen") && text.contains("short of 3.0 GiB"), "{text}");
    }
}
