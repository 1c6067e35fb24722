//! How much room a target has for journals, and how much each stream has taken of it: measured now and then, since it means
//! to look at every file.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use afterimage_wire::v1::{TargetRoom, TargetStreamReport};

use super::state::Proxy;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(5);
/// Bytes of a block, as `stat` counts them.
const BLOCK: u64 = 512;

/// What the last look found.
#[derive(Default)]
pub struct Measured {
    looked: Option<Instant>,
    /// A look that is under way.
    under_way: Option<Receiver<Found>>,
    found: Found,
}

/// Room, and bytes by uid of the stream.
#[derive(Default)]
struct Found {
    room: Option<TargetRoom>,
    held: HashMap<String, u64>,
}

impl Measured {
    /// The room of the target, if this proxy is one and has looked; what each stream has taken goes into its report.
    pub fn look(&mut self, proxy: &Proxy, streams: &mut [TargetStreamReport]) -> Option<TargetRoom> {
        let role = proxy.config.target.as_ref()?;
        match self.under_way.as_ref().map(Receiver::try_recv) {
            Some(Ok(found)) => {
                self.found = found;
                self.under_way = None;
            }
            Some(Err(TryRecvError::Disconnected)) => self.under_way = None,
            Some(Err(TryRecvError::Empty)) | None => {}
        }
        if self.under_way.is_none() && self.looked.is_none_or(|at| at.elapsed() >= LOOK) {
            self.looked = Some(Instant::now());
            let (root, reserve) = (role.journal.clone(), role.reserve);
            let budget = role.budget.unwrap_or(afterimage_dataplane::target::TargetConfig::new("").budget_bytes);
            let names: Vec<String> = streams.iter().map(|s| s.stream_uid.clone()).collect();
            let (send, receive) = channel();
            // A slow disk holds up no report; whoever looked for nothing has no ear.
            std::thread::spawn(move || drop(send.send(measure(&root, reserve, budget, names))));
            self.under_way = Some(receive);
        }
        for stream in streams {
            stream.held_bytes = self.found.held.get(&stream.stream_uid).copied().unwrap_or_default();
        }
        self.found.room
    }
}

fn measure(root: &Path, reserve_bytes: u64, default_budget_bytes: u64, streams: Vec<String>) -> Found {
    let room = match rustix::fs::statvfs(there(root)) {
        Ok(of) => Some(TargetRoom {
            total_bytes: of.f_blocks.saturating_mul(of.f_frsize),
            free_bytes: of.f_bavail.saturating_mul(of.f_frsize),
            reserve_bytes,
            default_budget_bytes,
        }),
        Err(error) => {
            tracing::warn!(%error, root = %root.display(), "cannot say how much room there is");
            None
        }
    };
    let held = streams.into_iter().map(|stream| {
        let bytes = held(&root.join("streams").join(&stream));
        (stream, bytes)
    });
    Found { room, held: held.collect() }
}

/// The folder, or the nearest above it that is there: the folder of journals is made with the first stream.
fn there(folder: &Path) -> &Path {
    folder.ancestors().find(|at| at.exists()).unwrap_or(folder)
}

/// What the files of a folder take. One that goes meanwhile takes nothing.
fn held(folder: &Path) -> u64 {
    let mut folders = vec![PathBuf::from(folder)];
    let mut bytes = 0u64;
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for entry in entries.filter_map(io::Result::ok) {
            match entry.metadata() {
                Ok(of) if of.is_dir() => folders.push(entry.path()),
                Ok(of) => bytes = bytes.saturating_add(of.blocks().saturating_mul(BLOCK)),
                Err(_) => {}
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_counted_as_it_lies_on_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let stream = dir.path().join("streams/s/replica");
        std::fs::create_dir_all(&stream).unwrap();
        let image = std::fs::File::create(stream.join("d.img")).unwrap();
        image.set_len(1 << 30).unwrap();
        std::fs::write(dir.path().join("streams/s/segment"), vec![7; 1 << 20]).unwrap();
        image.sync_all().unwrap();
        let found = measure(dir.path(), 5, 6, vec!["s".into(), "gone".into()]);
        let room = found.room.unwrap();
        assert!(room.total_bytes >= room.free_bytes && room.reserve_bytes == 5 && room.default_budget_bytes == 6);
        // Some file systems decide later how a file lies on the disk: less than the hole in it, in any case.
        assert!(found.held["s"] <= 4 << 20, "{}", found.held["s"]);
        assert_eq!(found.held["gone"], 0);
        // Before the first stream there is no folder yet.
        let new = measure(&dir.path().join("not/yet"), 5, 6, Vec::new()).room.unwrap();
        assert_eq!(new.total_bytes, room.total_bytes);
    }
}
