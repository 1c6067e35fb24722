//! Replica images: files of the target's own, or disks in their place.

use afterimage_wire::record::DiskInfo;
use afterimage_wire::{ALIGN, align_up};

use super::stream::Stream;
use crate::io::{Errno, File, Io, OpenHow};

/// A replica image.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Image {
    pub file: File,
    /// Bytes.
    pub size: u64,
    /// Alignment of I/O.
    pub block: u32,
    /// Ranges can be given back.
    pub unmap: bool,
}

/// A file or device that is the replica of a disk, in its place. It is neither made nor made longer.
fn open_base<I: Io>(io: &mut I, path: &str, size: u64) -> Result<Image, Errno> {
    let file = io.open(path, OpenHow { write: true, create_new: false, lock: true })?;
    let info = io.info(file).and_then(|info| if info.size < size { Err(Errno::INVAL) } else { Ok(info) });
    let info = info.inspect_err(|_| io.close(file))?;
    Ok(Image { file, size: info.size, block: info.block.clamp(512, ALIGN as u32), unmap: info.discard })
}

impl Stream {
    /// Makes sure that the disk's image is there and long enough; an image never shrinks.
    pub fn ensure_image<I: Io>(&mut self, io: &mut I, info: &DiskInfo) -> Result<(), Errno> {
        let want = align_up(usize::try_from(info.size).map_err(|_| Errno::INVAL)?) as u64;
        if let Some(path) = self.bases.get(&info.id) {
            return match self.images.get(&info.slot) {
                Some(image) if image.size < info.size => Err(Errno::INVAL),
                Some(_) => Ok(()),
                None => open_base(io, path, info.size).map(|image| {
                    self.images.insert(info.slot, image);
                }),
            };
        }
        if let Some(image) = self.images.get_mut(&info.slot) {
            if image.size < want {
                io.set_len(image.file, want, false)?;
                image.size = want;
            }
            return Ok(());
        }
        let (dir, path) = (format!("{}/replica", self.dir), format!("{}/replica/{}.img", self.dir, info.id));
        let how = OpenHow { write: true, create_new: false, lock: true };
        let file = match io.open(&path, how) {
            Err(Errno::NOENT) => {
                let file = io.open(&path, OpenHow { create_new: true, ..how })?;
                io.sync_dir(&dir).map(|()| file)
            }
            other => other,
        }?;
        let ready = io.info(file).and_then(|now| {
            if now.size < want {
                io.set_len(file, want, false)?;
            }
            Ok((now, now.size.max(want)))
        });
        let (now, size) = ready.inspect_err(|_| io.close(file))?;
        let block = now.block.clamp(512, ALIGN as u32);
        self.images.insert(info.slot, Image { file, size, block, unmap: now.discard });
        Ok(())
    }

    /// The image of a slot, at least `end` bytes long.
    pub fn image_for<I: Io>(&mut self, io: &mut I, slot: u16, end: u64) -> Result<Option<Image>, Errno> {
        let info = self.points.base().get(&slot).map(|life| life.info.clone());
        let info = info.or_else(|| {
            let known = self.history.table().disks.iter().find(|disk| disk.disk.slot == slot);
            known.map(|disk| disk.disk.clone())
        });
        let Some(info) = info else { return Ok(None) };
        self.ensure_image(io, &DiskInfo { size: info.size.max(end), ..info })?;
        Ok(self.images.get(&slot).copied())
    }
}
