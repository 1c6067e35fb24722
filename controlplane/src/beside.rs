//! Files beside the store whose loss is no reason not to start: what cannot be read is put aside, and begun anew.

use std::path::Path;

use redb::{Database, TableError, WriteTransaction};

/// Opens such a file, or makes it: `create` the database, in it the tables. `what` it holds is named if it is put aside.
///
/// # Errors
/// It can neither be opened nor made.
pub(crate) fn open(
    path: &Path,
    what: &str,
    create: impl Fn() -> Result<Database, String>,
    tables: impl Fn(&WriteTransaction) -> Result<(), TableError>,
) -> Result<Database, String> {
    let open = || -> Result<Database, String> {
        let database = create()?;
        let write = database.begin_write().map_err(|e| e.to_string())?;
        tables(&write).map_err(|e| e.to_string())?;
        write.commit().map_err(|e| e.to_string())?;
        Ok(database)
    };
    open().or_else(|why| {
        let aside = path.with_extension("redb.unreadable");
        tracing::error!(%why, aside = %aside.display(), "the {what} cannot be read: put aside, and begun anew");
        std::fs::rename(path, &aside).map_err(|e| format!("{}: {e}", path.display()))?;
        open()
    })
}
