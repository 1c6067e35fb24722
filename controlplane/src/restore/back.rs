//! What becomes of a failback of which the backup knows nothing, or an older state. Its stream is nobody's group.

use afterimage_wire::v1;

use super::{Observed, Restored};
use crate::model::{Model, Txn};
use crate::objects::{Group, GroupPhase, Object, Reverse, View, ViewKind};

/// A stream whose disks are those of a view: the way back of a group.
pub(super) fn is_source(group: &v1::SourceGroup) -> bool {
    group.disks.iter().any(|d| !d.view.is_empty())
}

/// A stream whose bases are disks of this host: the way back of a group.
pub(super) fn is_target(stream: &v1::TargetStream) -> bool {
    stream.disks.iter().any(|d| !d.base_path.is_empty())
}

/// What the proxies say of the group's way back, taken over into the group. `runs_from` is the view that its target says it
/// runs from; `released`, that its source may run.
pub(super) fn adopt(
    model: &Model,
    group: &mut Group,
    all: &[Observed],
    runs_from: Option<&str>,
    released: bool,
    restored: &mut Restored,
    txn: &mut Txn,
) {
    let name = group.id.clone();
    let at = |id: &str| all.iter().find(|o| o.proxy.id == id && o.proxy.tenant == group.tenant);
    let (source, target) = (at(&group.source), at(&group.target));
    let Some(target) = target else { return };
    let said = target.state.sources.iter().find(|s| s.name == name && is_source(s));
    let known = group.reverse.take();
    if let (Some(said), Some(view)) = (said, runs_from) {
        let kept = source.and_then(|o| o.state.targets.iter().find(|t| t.stream_uid == said.stream_uid));
        let same = known.as_ref().filter(|r| r.stream_uid == said.stream_uid);
        let told = kept.iter().flat_map(|t| &t.disks).map(|d| d.generation);
        let generations = said.disks.iter().map(|d| d.generation).chain(told);
        let generation = generations.chain(same.map(|r| r.generation)).max().unwrap_or(1);
        if same.is_none() {
            restored.note(format!("group \"{name}\": failing back since, from its view \"{view}\""));
        }
        // Held in the middle of a switch: it goes on if the source is known to be held.
        let hold = said.hold && (released || source.is_none());
        let writer_generation = match hold {
            true => said.disks.iter().map(|d| d.generation).max().unwrap_or(1),
            false => generation,
        };
        let stream_uid = said.stream_uid.clone();
        group.reverse = Some(Reverse { stream_uid, view: view.to_owned(), generation, writer_generation, hold });
        group.overwritten |= said.hold;
        group.phase = GroupPhase::FailingBack { view: view.to_owned() };
        return;
    }
    let Some(known) = known else { return };
    restored.note(format!("group \"{name}\": its failback has ended since"));
    // Nobody knows whether its source's disks were written.
    group.overwritten = true;
    let stays = source.is_none_or(|o| o.state.targets.iter().any(|t| t.stream_uid == known.stream_uid));
    if said.is_some() || stays {
        group.leave(&known.stream_uid, said.is_some(), stays);
    }
    match runs_from {
        Some(view) => group.phase = GroupPhase::FailedOver { view: view.to_owned() },
        None if released => group.phase = GroupPhase::FailedBack { view: known.view.clone(), after: 0 },
        None => group.phase = GroupPhase::FailedOver { view: known.view.clone() },
    }
    if runs_from.is_none()
        && let Ok(view) = model.view(&group.name(), &known.view)
        && view.kind == ViewKind::Failover
    {
        // What was written to it is at the target, under its name.
        let (version, exports) = (view.version + 1, Vec::new());
        txn.put(Object::View(View { open: false, closing: false, kept: true, version, exports, ..view.clone() }));
    }
}
