//! What is wanted of a journal by itself.

use std::path::PathBuf;

use afterimage_wire::v1::{DesiredState, LocalFailoverRequest, PointChoice};

/// What is wanted of a journal.
#[derive(Clone, PartialEq)]
pub struct OpenJournal {
    /// The journal.
    pub folder: PathBuf,
    /// Its stream, with its keys.
    pub desired: DesiredState,
    /// Name of the view.
    pub view: String,
    /// Which point.
    pub at: PointChoice,
    /// Hosts may write, into a delta.
    pub writable: bool,
    /// Say where the disks are as JSON.
    pub json: bool,
    /// The group is failed over to that point: from now on it runs from here.
    pub failover: Option<LocalFailoverRequest>,
}

impl Eq for OpenJournal {}

impl std::fmt::Debug for OpenJournal {
    // There are keys in it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OpenJournal({})", self.folder.display())
    }
}
