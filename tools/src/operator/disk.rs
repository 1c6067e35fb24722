//! `afterimage disk`: the disks of a group; and how a disk is written on the command line.

use afterimage_wire::v1;
use clap::{Args, Subcommand};

use super::documents::{self, group_of, id};
use super::failure::Failure;
use super::output::{table, text};
use super::session::{Session, every};
use super::values::{show_size, size};

/// Verbs of `afterimage disk`.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Add a disk to a group: it joins the stream and is synchronised while the others go on.
    #[command(after_help = "Examples:\n  \
        afterimage disk add shop logs --path /dev/vg0/logs\n  \
        afterimage disk add shop data2 --path /srv/data2.img --size 10GiB --export shop-data2")]
    Add {
        /// The group's name.
        group: String,
        /// The disk's name within the group.
        disk: String,
        #[command(flatten)]
        place: Place,
        /// Check only.
        #[arg(long)]
        dry_run: bool,
    },
    /// List the disks of a group, or of all groups.
    List {
        /// The group's name.
        group: Option<String>,
    },
    /// Take a disk out of its group: it leaves the stream, the others go on, its older points stay.
    Remove {
        /// The group's name.
        group: String,
        /// The disk's name within the group.
        disk: String,
    },
}

/// Where a disk is and how it is offered.
#[derive(Args, Debug, Default)]
pub struct Place {
    /// Absolute path of a raw file or block device on the source proxy's host.
    #[arg(long)]
    path: String,
    /// Refuse if it has another size, such as 10GiB [default: what is there].
    #[arg(long, value_parser = size)]
    size: Option<u64>,
    /// Logical block, bytes [default: what the disk has].
    #[arg(long, value_name = "SIZE", value_parser = size)]
    block: Option<u64>,
    /// Serial, at most 20 characters [default: from its uid].
    #[arg(long)]
    serial: Option<String>,
    /// NBD export that machines use [default: GROUP/DISK].
    #[arg(long)]
    export: Option<String>,
    /// Raw image of the disk on the target proxy's host, on the journal's file system: it becomes the replica, and only
    /// what differs is sent.
    #[arg(long, value_name = "PATH")]
    seed: Option<String>,
}

impl Place {
    fn disk(self, name: &str) -> Result<v1::Disk, Failure> {
        if !self.path.starts_with('/') {
            return Err(Failure::usage(format!("disk \"{name}\": the path \"{}\" is not absolute", self.path))
                .hint("give the path on the source proxy's host from / on"));
        }
        let block = u32::try_from(self.block.unwrap_or(0)).map_err(|_| {
            Failure::usage(format!("disk \"{name}\": a block of more than 65536 bytes is not possible"))
        })?;
        Ok(v1::Disk {
            name: name.to_owned(),
            path: self.path,
            size_bytes: self.size.unwrap_or(0),
            block_bytes: block,
            serial: self.serial.unwrap_or_default(),
            export_name: self.export.unwrap_or_default(),
            seed_path: self.seed.unwrap_or_default(),
            ..Default::default()
        })
    }
}

/// Reads `NAME=PATH[,size=…][,block=…][,serial=…][,export=…][,seed=…]`.
pub fn written(text: &str) -> Result<v1::Disk, String> {
    let (name, rest) = text
        .split_once('=')
        .filter(|(name, _)| !name.is_empty())
        .ok_or_else(|| format!("`{text}` is no disk; write NAME=PATH, as in data=/srv/data.img"))?;
    let mut parts = rest.split(',');
    let mut place = Place { path: parts.next().unwrap_or_default().to_owned(), ..Default::default() };
    for part in parts {
        match part.split_once('=') {
            Some(("size", value)) => place.size = Some(size(value)?),
            Some(("block", value)) => place.block = Some(size(value)?),
            Some(("serial", value)) => place.serial = Some(value.to_owned()),
            Some(("export", value)) => place.export = Some(value.to_owned()),
            Some(("seed", value)) => place.seed = Some(value.to_owned()),
            _ => {
                let allowed = "size=, block=, serial=, export=, seed=";
                return Err(format!("`{part}` is unknown in a disk; allowed are {allowed}"));
            }
        }
    }
    place.disk(name).map_err(|failure| failure.to_string())
}

/// Runs a verb.
pub async fn run(verb: Verb, session: &Session) -> Result<(), Failure> {
    let out = session.out;
    match verb {
        Verb::Add { group, disk, place, dry_run } => {
            let request = v1::CreateDiskRequest {
                parent: session.group(&group),
                disk_id: disk.clone(),
                disk: Some(place.disk(&disk)?),
                validate_only: dry_run,
                request_id: uuid::Uuid::new_v4().to_string(),
            };
            let made = session.ask(object(&group, &disk), session.groups().create_disk(request)).await?;
            out.show(&documents::disk(&made), || listed(std::slice::from_ref(&made)));
            if !dry_run {
                out.note(&format!("it is being synchronised now; watch it: afterimage watch {group}"));
            }
        }
        Verb::List { group: Some(group) } => {
            let request = v1::ListDisksRequest { parent: session.group(&group), ..Default::default() };
            let disks: Vec<v1::Disk> = every!(session, format!("group \"{group}\""), groups.list_disks(request).disks);
            show(out, &disks);
        }
        Verb::List { group: None } => {
            let request = v1::ListGroupsRequest { parent: session.tenant(), ..Default::default() };
            let groups: Vec<v1::Group> = every!(session, "groups", groups.list_groups(request).groups);
            let disks: Vec<v1::Disk> = groups.into_iter().flat_map(|group| group.disks).collect();
            show(out, &disks);
        }
        Verb::Remove { group, disk } => {
            let object = object(&group, &disk);
            let name = session.disk(&group, &disk);
            // A misspelt name is to be found out before the question, not after.
            session.ask(&object, session.groups().get_disk(v1::GetDiskRequest { name: name.clone() })).await?;
            out.confirm(
                &object,
                &format!(
                    "Disk {disk} will not be protected any more, and points of {group} from now on do not hold it.\n\
                     Its older points stay for as long as the policy keeps them; the source disk is not touched."
                ),
            )?;
            session
                .ask(&object, session.groups().delete_disk(v1::DeleteDiskRequest { name, ..Default::default() }))
                .await?;
            out.show(&serde_json::json!({"deleted": {"group": group, "disk": disk}}), || {
                format!("disk {disk} has left group {group}")
            });
        }
    }
    Ok(())
}

fn show(out: super::output::Output, disks: &[v1::Disk]) {
    let document = disks.iter().map(documents::disk).collect::<Vec<_>>();
    out.show(&serde_json::json!({"disks": document}), || listed(disks));
}

fn object(group: &str, disk: &str) -> String {
    format!("disk \"{group}/{disk}\"")
}

/// Disks as a table.
pub fn listed(disks: &[v1::Disk]) -> String {
    if disks.is_empty() {
        return "no disks; add one: afterimage disk add GROUP NAME --path /dev/…".to_owned();
    }
    table(
        &["GROUP", "DISK", ">SIZE", ">BLOCK", ">GENERATION", "EXPORT", "PATH AT SOURCE"],
        disks.iter().map(|disk| {
            vec![
                text(group_of(&disk.name)),
                text(id(&disk.name)),
                text(show_size(disk.size_bytes)),
                text(show_size(u64::from(disk.block_bytes))),
                text(disk.generation.to_string()),
                text(&disk.export_name),
                text(&disk.path),
            ]
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_read_with_what_is_not_the_default() {
        let disk = written("data=/srv/a=b.img,size=1G,block=4K,serial=S1,export=shop").unwrap();
        assert_eq!((disk.name.as_str(), disk.path.as_str()), ("data", "/srv/a=b.img"));
        assert_eq!((disk.size_bytes, disk.block_bytes), (1 << 30, 4096));
        assert_eq!((disk.serial.as_str(), disk.export_name.as_str()), ("S1", "shop"));
    }

    #[test]
    fn a_disk_that_is_none_is_refused_by_what_is_wrong() {
        assert!(written("/srv/a.img").unwrap_err().contains("NAME=PATH"));
        assert!(written("data=srv/a.img").unwrap_err().contains("not absolute"));
        assert!(written("data=/a,sise=1G").unwrap_err().contains("`sise=1G` is unknown"));
        assert!(written("data=/a,size=much").unwrap_err().contains("no size"));
        assert!(written("=/a").is_err());
    }

    #[test]
    fn a_table_of_disks_fits_100_columns() {
        let disk = v1::Disk {
            name: format!("tenants/default/groups/{}/disks/{}", "g".repeat(63), "d".repeat(63)),
            path: format!("/{}", "p".repeat(200)),
            size_bytes: (1 << 50) + 1,
            block_bytes: 4096,
            export_name: "e".repeat(127),
            ..Default::default()
        };
        assert!(listed(&[disk]).lines().all(|line| line.chars().count() <= 100));
    }
}
