//! The folders of one simulated disk: names that everyone sees, and names that a power loss leaves.
//!
//! A change of names is durable only after its folder was synced; until then a power loss keeps or loses it. Changes of
//! one folder are lost in order: none survives an earlier one of its folder, or of its names, that was lost.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use super::Rng;
use crate::io::Errno;

/// Names a content on its disk.
pub(super) type InodeId = u64;

#[derive(Clone, Debug)]
enum Change {
    Link { path: String, inode: InodeId },
    Unlink { path: String },
    Rename { from: String, to: String, inode: InodeId },
}

impl Change {
    fn paths(&self) -> [&str; 2] {
        match self {
            Self::Link { path, .. } | Self::Unlink { path } => [path, path],
            Self::Rename { from, to, .. } => [from, to],
        }
    }

    fn touches(&self, dir: &str) -> bool {
        self.paths().iter().any(|path| folder(path) == dir)
    }

    fn apply(self, names: &mut BTreeMap<String, InodeId>) {
        match self {
            Self::Link { path, inode } => {
                names.insert(path, inode);
            }
            Self::Unlink { path } => {
                names.remove(&path);
            }
            Self::Rename { from, to, inode } => {
                names.remove(&from);
                names.insert(to, inode);
            }
        }
    }
}

/// All names of a disk. Folders are durable as soon as they are made.
#[derive(Clone, Default)]
pub(super) struct Names {
    visible: BTreeMap<String, InodeId>,
    stable: BTreeMap<String, InodeId>,
    pending: Vec<Change>,
    dirs: BTreeSet<String>,
}

/// A path in its one form: no empty parts.
pub(super) fn tidy(path: &str) -> String {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    let root = if path.starts_with('/') { "/" } else { "" };
    format!("{root}{}", parts.join("/"))
}

fn folder(path: &str) -> &str {
    match path.rfind('/') {
        Some(0) => "/",
        Some(at) => &path[..at],
        None => "",
    }
}

impl Names {
    pub(super) fn get(&self, path: &str) -> Option<InodeId> {
        self.visible.get(path).copied()
    }

    /// A copy of what is visible, all of it durable.
    pub(super) fn settled(&self) -> Self {
        Self { stable: self.visible.clone(), pending: Vec::new(), ..self.clone() }
    }

    /// Names that begin with `prefix`, sorted.
    pub(super) fn visible<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a String, InodeId)> {
        let from = (Bound::Included(prefix), Bound::Unbounded);
        let names = self.visible.range::<str, _>(from).take_while(move |(path, _)| path.starts_with(prefix));
        names.map(|(path, inode)| (path, *inode))
    }

    pub(super) fn is_dir(&self, path: &str) -> bool {
        path.is_empty() || path == "/" || self.dirs.contains(path)
    }

    /// True if a file may be made there.
    pub(super) fn has_folder(&self, path: &str) -> bool {
        self.is_dir(folder(path))
    }

    pub(super) fn make_dir(&mut self, path: &str) {
        let mut path = path;
        while !self.is_dir(path) {
            self.dirs.insert(path.to_owned());
            path = folder(path);
        }
    }

    pub(super) fn list(&self, dir: &str) -> Vec<String> {
        let base = |path: &String| path[path.rfind('/').map_or(0, |at| at + 1)..].to_owned();
        let files = self.visible.keys().filter(|path| folder(path) == dir).map(base);
        files.chain(self.dirs.iter().filter(|path| folder(path) == dir).map(base)).collect()
    }

    pub(super) fn link(&mut self, path: &str, inode: InodeId) -> Result<(), Errno> {
        if !self.has_folder(path) {
            return Err(Errno::NOENT);
        }
        if self.visible.contains_key(path) || self.is_dir(path) {
            return Err(Errno::EXIST);
        }
        self.change(Change::Link { path: path.to_owned(), inode });
        Ok(())
    }

    /// Puts a name in place at once and durably, folders too.
    pub(super) fn put(&mut self, path: &str, inode: InodeId) {
        self.make_dir(folder(path));
        self.replace(path, inode);
        self.sync(folder(path));
    }

    /// Puts a name in place, replacing what is there, as a rename over it does.
    pub(super) fn replace(&mut self, path: &str, inode: InodeId) {
        self.change(Change::Link { path: path.to_owned(), inode });
    }

    pub(super) fn unlink(&mut self, path: &str) -> Result<(), Errno> {
        if !self.visible.contains_key(path) {
            return Err(Errno::NOENT);
        }
        self.change(Change::Unlink { path: path.to_owned() });
        Ok(())
    }

    pub(super) fn rename(&mut self, from: &str, to: &str) -> Result<(), Errno> {
        let inode = self.get(from).ok_or(Errno::NOENT)?;
        if !self.is_dir(folder(to)) {
            return Err(Errno::NOENT);
        }
        self.change(Change::Rename { from: from.to_owned(), to: to.to_owned(), inode });
        Ok(())
    }

    fn change(&mut self, change: Change) {
        change.clone().apply(&mut self.visible);
        self.pending.push(change);
    }

    /// Makes the folder's changes durable, and those of other folders that they build on; no others.
    pub(super) fn sync(&mut self, dir: &str) {
        let mut needed: BTreeSet<String> = BTreeSet::new();
        let mut durable = vec![false; self.pending.len()];
        for (number, change) in self.pending.iter().enumerate().rev() {
            if change.touches(dir) || change.paths().iter().any(|path| needed.contains(*path)) {
                durable[number] = true;
                needed.extend(change.paths().map(str::to_owned));
            }
        }
        let mut left = Vec::new();
        for (number, change) in self.pending.drain(..).enumerate() {
            if durable[number] {
                change.apply(&mut self.stable);
            } else {
                left.push(change);
            }
        }
        self.pending = left;
    }

    pub(super) fn power_loss(&mut self, rng: &mut Rng) {
        let mut lost: BTreeSet<String> = BTreeSet::new();
        for change in std::mem::take(&mut self.pending) {
            let builds_on_lost =
                change.paths().iter().any(|path| lost.contains(*path) || lost.contains(&format!("{}/", folder(path))));
            if !builds_on_lost && rng.chance(0.5) {
                change.apply(&mut self.stable);
            } else {
                for path in change.paths() {
                    lost.insert(path.to_owned());
                    lost.insert(format!("{}/", folder(path)));
                }
            }
        }
        self.visible = self.stable.clone();
    }

    /// All that any name leads to, now or after a power loss.
    pub(super) fn reachable(&self) -> BTreeSet<InodeId> {
        let pending = self.pending.iter().filter_map(|change| match change {
            Change::Link { inode, .. } | Change::Rename { inode, .. } => Some(*inode),
            Change::Unlink { .. } => None,
        });
        self.visible.values().chain(self.stable.values()).copied().chain(pending).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_synced_folder_keeps_its_names() {
        let mut names = Names::default();
        names.make_dir("a/b");
        names.link("a/b/kept", 1).unwrap();
        names.sync("a/b");
        names.link("a/b/lost", 2).unwrap();
        let mut seen = BTreeSet::new();
        for seed in 0..20 {
            let mut copy = Names { pending: names.pending.clone(), ..Default::default() };
            copy.stable.clone_from(&names.stable);
            copy.power_loss(&mut Rng::new(seed));
            assert_eq!(copy.get("a/b/kept"), Some(1));
            seen.insert(copy.get("a/b/lost"));
        }
        assert_eq!(seen.len(), 2);
    }

    #[test]
    fn a_rename_never_leaves_both_or_none() {
        for seed in 0..50 {
            let mut names = Names::default();
            names.link("new", 1).unwrap();
            names.link("old", 2).unwrap();
            names.sync("");
            names.rename("new", "old").unwrap();
            names.power_loss(&mut Rng::new(seed));
            let (new, old) = (names.get("new"), names.get("old"));
            assert!((new, old) == (Some(1), Some(2)) || (new, old) == (None, Some(1)), "{new:?} {old:?}");
        }
    }

    #[test]
    fn paths_have_one_form() {
        assert_eq!(tidy("/a//b/"), "/a/b");
        assert_eq!(tidy("./a/b"), "a/b");
    }

    #[test]
    fn a_folder_lists_files_and_folders() {
        let mut names = Names::default();
        names.make_dir("j/s");
        names.link("j/t", 1).unwrap();
        assert_eq!(names.list("j"), ["t", "s"]);
        assert_eq!(names.link("none/t", 1), Err(Errno::NOENT));
    }
}
