//! Where groups go: what is known of the targets, for [`crate::placement`].

use afterimage_wire::v1;

use super::Coordinator;
use crate::live::Live;
use crate::model::Model;
use crate::names::{Kind, Name};
use crate::objects::{Group, Policy, Proxy};
use crate::placement::{self, Candidate, Need, Placement, Room};
use crate::problem::Problem;

impl Coordinator {
    /// The target of a new group whose disks are so large together, and why.
    ///
    /// # Errors
    /// It fits nowhere, with the numbers.
    pub(super) fn choose_target(&self, model: &Model, group: &Group, size: u64) -> Result<(String, String), Problem> {
        let (source, policy) = (model.source_of(group), model.policy_of(group));
        let found = self.place(model, need(source, policy, &group.source, size), &group.tenant, None);
        match found.target {
            Some(target) => Ok((target, found.reason)),
            None => {
                let remedy = "make room or add a target, or name one as `target`";
                Err(Problem::state(group.name(), format!("not to be placed: {}", found.reason), remedy))
            }
        }
    }

    /// Where a need fits. What `without` takes is not counted.
    fn place(&self, model: &Model, need: Need, tenant: &str, without: Option<&Group>) -> Placement {
        let now = self.clock.mono_ns();
        let live = self.live.lock().expect("nothing panics while it holds this");
        let proxies = model.proxies.values().filter(|p| p.tenant == tenant);
        let candidate = |proxy: &Proxy| {
            let connected = self.sessions.connected(&proxy.uid);
            Candidate { connected, ..candidate(model, &live, proxy, without, now) }
        };
        let candidates: Vec<Candidate> = proxies.map(candidate).collect();
        placement::place(&need, &candidates)
    }

    /// Where a group would go if it were created now.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn explain_group(&self, name: &Name) -> Result<v1::Placement, Problem> {
        let model = self.model();
        let group = model.group(name)?;
        let size = model.disks_of(group).map(|d| d.size).sum();
        let need = need(model.source_of(group), model.policy_of(group), &group.source, size);
        Ok(to_proto(&name.tenant, self.place(&model, need, &name.tenant, Some(group))))
    }

    /// Where a group of that source, policy and size would go.
    ///
    /// # Errors
    /// There is no such proxy or policy.
    pub fn explain_placement(
        &self,
        tenant: &str,
        source: &Name,
        policy: &Name,
        size: u64,
    ) -> Result<v1::Placement, Problem> {
        let model = self.model();
        let need = need(Some(model.proxy(source)?), Some(model.policy(policy)?), &source.id, size);
        Ok(to_proto(tenant, self.place(&model, need, tenant, None)))
    }
}

fn need(source: Option<&Proxy>, policy: Option<&Policy>, source_id: &str, size: u64) -> Need {
    Need {
        disks: size,
        budget: policy.map_or(0, |p| p.promises.journal_budget_bytes),
        source: source_id.to_owned(),
        site: source.map(|s| s.site.clone()).unwrap_or_default(),
        same_site: policy.is_some_and(|p| p.promises.same_site),
        avoid: Vec::new(),
    }
}

/// What is known of a proxy, but whether it is connected.
fn candidate(model: &Model, live: &Live, proxy: &Proxy, without: Option<&Group>, now_ns: u64) -> Candidate {
    let room = live.proxies.get(&proxy.uid).and_then(|p| p.room).map(|r| Room {
        total: r.total_bytes,
        free: r.free_bytes,
        reserve: r.reserve_bytes,
        default_budget: r.default_budget_bytes,
    });
    let mut found = Candidate {
        id: proxy.id.clone(),
        site: proxy.site.clone(),
        takes_streams: !proxy.data_address.is_empty(),
        room,
        ..Candidate::default()
    };
    let kept = model.groups.values().filter(|g| g.tenant == proxy.tenant && g.target == proxy.id);
    for group in kept.filter(|g| without.is_none_or(|w| w.uid != g.uid)) {
        let stream = live.streams.get(&group.uid);
        let size = model.disks_of(group).map(|d| d.size).sum();
        let wanted = need(None, model.policy_of(group), "", size).bytes(room.unwrap_or_default());
        // What it has taken already is not free any more.
        let held = stream.and_then(|s| s.target.as_ref()).map_or(0, |(_, report)| report.held_bytes);
        found.promised = found.promised.saturating_add(wanted.saturating_sub(held));
        found.groups += 1;
        found.wire_per_s += stream.map_or(0, |s| s.rates.shown(now_ns).wire as u64);
    }
    found
}

fn to_proto(tenant: &str, placement: Placement) -> v1::Placement {
    let name = |id: &str| Name::new(tenant, Kind::Proxy, id).to_string();
    let room = |room: Room| v1::TargetRoom {
        total_bytes: room.total,
        free_bytes: room.free,
        reserve_bytes: room.reserve,
        default_budget_bytes: room.default_budget,
    };
    let candidates = placement.verdicts.into_iter().filter(|v| v.candidate.takes_streams).map(|v| {
        let c = v.candidate;
        v1::PlacementCandidate {
            proxy: name(&c.id),
            fits: v.fits,
            reason: v.reason,
            site: c.site,
            room: c.room.map(room),
            promised_bytes: c.promised,
            needed_bytes: v.needed,
            groups: c.groups,
            wire_bytes_per_s: c.wire_per_s as f64,
        }
    });
    v1::Placement {
        target: placement.target.as_deref().map(name).unwrap_or_default(),
        reason: placement.reason,
        candidates: candidates.collect(),
    }
}
