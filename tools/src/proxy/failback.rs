//! What a failback asks of the old site: its disks are let go of, become what a stream begins with, and get what the stream
//! brought.

use afterimage_wire::ids::StreamId;
use afterimage_wire::v1::command_result::Outcome;
use afterimage_wire::v1::{CommandErrorKind as Kind, Done, MergeStream, Merged, ReleaseDisks, Severity, SourceGroup};

use super::commands::{Refused, forget_disks, forget_spill, refused, target};
use super::state::Proxy;
use super::{branch, converge, convert, cores};

/// Ends a held stream, so that its disks can be opened by another. What is remembered of them stays.
pub async fn release_disks(proxy: &Proxy, said: &ReleaseDisks) -> Result<Outcome, Refused> {
    let stream: StreamId = convert::id("stream_uid", &said.stream_uid)?;
    let running = proxy.applied.borrow().groups.get(&stream).cloned();
    let Some(group) = running else { return Ok(Outcome::Done(Done {})) };
    if !group.hold {
        return refused(Kind::WrongState, format!("group `{}` is not held: its machine may run", group.name));
    }
    match converge::unprotect(proxy, stream).await? {
        Some(_) => Ok(Outcome::Done(Done {})),
        None => refused(Kind::Io, format!("group `{}` does not stop: a disk may hang", group.name)),
    }
}

/// Writes what a stream holds into its bases; asked again until that is done.
pub async fn merge_stream(proxy: &Proxy, said: &MergeStream) -> Result<Outcome, Refused> {
    let stream: StreamId = convert::id("stream_uid", &said.stream_uid)?;
    let source: StreamId = convert::id("source_uid", &said.source_uid)?;
    let target = target(proxy)?;
    if proxy.applied.borrow().groups.contains_key(&source) {
        return refused(Kind::WrongState, format!("the disks are protected from here as stream {source}"));
    }
    keep_branch(proxy, source, &said.stream_uid).await?;
    let seq = said.seq;
    match target.call(move |desk| desk.core.merge(stream, seq)).await? {
        Ok(status) => Ok(Outcome::Merged(Merged {
            complete: status.complete,
            merged_bytes: status.done,
            total_bytes: status.total,
            written_bytes: status.written,
        })),
        Err(error) => Err(error.into()),
    }
}

/// Before the first byte is written, what only these disks hold is put aside, and what was remembered of them is forgotten:
/// whoever protects them next compares all of them.
async fn keep_branch(proxy: &Proxy, source: StreamId, stream: &str) -> Result<(), Refused> {
    let uid = source.to_string();
    let group = proxy.desired.borrow().sources.iter().find(|group| group.stream_uid == uid).cloned();
    let (Some(group), Some(role)) = (group, &proxy.config.target) else {
        return refused(Kind::NotFound, format!("stream {source} was not protected from here"));
    };
    let disks = convert::group(&group, &proxy.places_of(&group), false)?.disks;
    if !disks.iter().any(|disk| std::path::Path::new(&disk.log_path).exists()) {
        // Done before, or nothing is known of what only they hold.
        return Ok(());
    }
    let folder = cores::outbound(role).join(format!("branch-{stream}")).to_string_lossy().into_owned();
    let to = folder.clone();
    // Bulk files: away from the thread that answers the coordinator and makes the links.
    let kept = tokio::task::spawn_blocking(move || {
        let branch = branch::branch_of(source, &disks, "")?;
        // All of a disk would be a copy of it: what of it is of use is at the other site, too.
        let some = branch.disks.iter().any(|disk| !disk.ranges.is_empty());
        let all = branch.disks.iter().any(|disk| disk.whole);
        if !some || all {
            return Ok(false);
        }
        // What was not finished: the disks are as they were, or it would have been forgotten.
        match std::fs::remove_dir_all(&to) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(format!("`{to}`: {error}")),
            _ => branch::branch_of(source, &disks, &to).map(|_| true),
        }
    });
    match kept.await {
        Ok(Ok(true)) => {
            let message = format!("what only the disks of `{}` held is kept in {folder}", group.name);
            proxy.event(Severity::Warning, Some(source), "failback", message);
        }
        Ok(Ok(false)) => {}
        Ok(Err(why)) => return refused(Kind::Io, format!("what only the disks hold cannot be kept: {why}")),
        Err(_) => return refused(Kind::Io, "the copy of what only the disks hold has ended early: see the log"),
    }
    forget(proxy, &group)
}

fn forget(proxy: &Proxy, group: &SourceGroup) -> Result<(), Refused> {
    forget_disks(proxy, group)?;
    forget_spill(proxy, group);
    // It has to be gone before anything of the disks is another.
    let left = convert::group(group, &proxy.places_of(group), false)?.disks;
    for path in left.iter().map(|disk| std::path::Path::new(&disk.log_path)) {
        if path.exists() {
            return refused(Kind::Io, format!("`{}` cannot be removed", path.display()));
        }
        if let Some(folder) = path.parent()
            && let Err(error) = std::fs::File::open(folder).and_then(|folder| folder.sync_all())
        {
            return refused(Kind::Io, format!("`{}`: {error}", folder.display()));
        }
    }
    Ok(())
}
