//! Seeding: a raw image that was brought here by hand becomes the replica that the first synchronisation compares with.
//!
//! The image is renamed into its place, so it must lie on the journal's file system, and nothing of it is copied. It is
//! synced before a source is let in: a comparison that found it equal counts on it from then on, also after a power loss.
//! Only a disk of which nothing is known can be seeded. What is in the image is not trusted for anything: the first
//! synchronisation is a whole one, and no point holds the disk before its end.

use afterimage_wire::record::DiskInfo;

use super::ops::{Ctx, Purpose};
use super::stream::Stream;
use crate::io::{Done, Errno, Io, Nanos, Op, OpenHow};

/// How long until a seed that could not be taken is tried again.
const AGAIN: Nanos = 1_000_000_000;
/// Rename over a border between file systems.
const XDEV: Errno = Errno(18);

/// Seeds of a stream's disks.
#[derive(Debug, Default)]
pub(crate) struct Seeds {
    /// Disk and path of those that are not taken yet.
    pub wanted: Vec<(afterimage_wire::ids::DiskId, String)>,
    /// Being synced.
    syncing: usize,
    again: Option<Nanos>,
    /// Why one cannot be taken.
    pub error: Option<String>,
}

impl Seeds {
    /// No source is let in while one is being made safe.
    pub fn is_busy(&self) -> bool {
        self.syncing > 0
    }

    /// When to try again.
    pub fn deadline(&self) -> Option<Nanos> {
        self.again
    }
}

fn parent(path: &str) -> &str {
    match path.rfind('/') {
        Some(0) => "/",
        Some(at) => &path[..at],
        None => ".",
    }
}

impl Stream {
    /// Takes what seeds there are. The images of their disks must not be made before.
    pub(crate) fn seed_turn<I: Io>(&mut self, ctx: &mut Ctx<'_, I>) {
        if self.seeds.wanted.is_empty() || self.seeds.again.is_some_and(|again| ctx.io.now() < again) {
            return;
        }
        (self.seeds.again, self.seeds.error) = (None, None);
        for (disk, path) in std::mem::take(&mut self.seeds.wanted) {
            let known = self.history.table().disk(disk).map(|known| (known.disk.clone(), known.member));
            // Of a disk that is not in the stream (yet) nothing is to be seeded; one that has been in it has a replica.
            let Some((info, member)) = known else { continue };
            if member || self.images.contains_key(&info.slot) {
                continue;
            }
            match self.take_seed(ctx, &info, &path) {
                Ok(()) => {}
                Err(why) => {
                    tracing::error!(stream = %self.config.stream, disk = info.name, path, why, "no seed is taken");
                    self.seeds.error = Some(format!("`seed_path` of disk `{}` is `{path}`: {why}", info.name));
                    self.seeds.wanted.push((disk, path));
                    self.seeds.again = Some(ctx.io.now() + AGAIN);
                }
            }
        }
    }

    fn take_seed<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, info: &DiskInfo, path: &str) -> Result<(), String> {
        let dir = format!("{}/replica", self.dir);
        let image = format!("{dir}/{}.img", info.id);
        let say = |what: &str, errno: Errno| format!("{what}: {errno}");
        match ctx.io.open(&image, OpenHow::default()) {
            // Taken in an earlier life, which may not have come to its sync; or the disk was here before.
            Ok(file) => {
                ctx.io.close(file);
                return self.sync_seed(ctx, info);
            }
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(say("the replica cannot be looked at", errno)),
        }
        // Whoever still writes to it holds a lock, if it is one of us.
        let how = OpenHow { write: true, create_new: false, lock: true };
        let file = ctx.io.open(path, how).map_err(|errno| say("it cannot be opened", errno))?;
        let size = ctx.io.info(file).map(|found| found.size);
        ctx.io.close(file);
        match size {
            Ok(0) => return Err("it is empty; allowed is a raw image of the disk".into()),
            Ok(_) => {}
            Err(errno) => return Err(say("it cannot be looked at", errno)),
        }
        ctx.io.rename(path, &image).map_err(|errno| match errno {
            XDEV => format!("it lies on another file system; allowed is one on that of {dir}"),
            errno => say("it cannot be moved to the replicas", errno),
        })?;
        // Its new name first: a crash in between leaves it under both or one, never under none.
        for folder in [dir.as_str(), parent(path)] {
            ctx.io.sync_dir(folder).map_err(|errno| say("its new place cannot be made durable", errno))?;
        }
        tracing::info!(stream = %self.config.stream, disk = info.name, path, size = ?size, "a seed is the replica now");
        self.sync_seed(ctx, info)
    }

    fn sync_seed<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, info: &DiskInfo) -> Result<(), String> {
        self.ensure_image(ctx.io, info).map_err(|errno| format!("it cannot be opened as a replica: {errno}"))?;
        let Some(image) = self.images.get(&info.slot) else { return Ok(()) };
        self.seeds.syncing += 1;
        ctx.submit(Purpose::Seed(self.id), Op::Sync { file: image.file });
        Ok(())
    }

    /// A seed is on stable storage, or cannot be.
    pub(crate) fn seed_done(&mut self, done: &Done) {
        self.seeds.syncing -= 1;
        if let Err(errno) = done.result {
            self.seeds.error = Some(format!("`seed_path`: the image cannot be synced: {errno}"));
        }
    }
}
