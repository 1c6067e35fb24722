//! The front ends of a data thread: each speaks one protocol to hosts, all ask the same disks.
//!
//! A further one is its machine (a [`FrontEnd`], with a [`FrontId`](afterimage_dataplane::host::FrontId) of its own), a line
//! in the table below and one in [`uris`]; what can be set of it stands in `config.rs`, and `service.rs` lets its hosts in.
//! Capture, views, reports and everything behind them do not know which front ends there are.

use super::runtime::ThreadIo;
use afterimage_dataplane::host::{DiskKey, Disks, ExportStatus, FrontEnd};
use afterimage_dataplane::io::Done;

use super::state::Proxy;
use super::ublk::Role;
use super::{convert, vhost};

/// A table of front ends: what it is, its name, its machine, the machine's id (the upper 16 bits of its tokens).
macro_rules! fronts {
    ($($(#[$about:meta])* $name:ident: $module:ident, $id:literal;)*) => {
        /// All of them.
        pub struct Fronts {
            $($(#[$about])* pub $name: afterimage_dataplane::$module::Server<ThreadIo>,)*
        }

        impl Fronts {
            /// Without hosts.
            pub fn new() -> Self {
                use afterimage_dataplane as machines;
                Self { $($name: machines::$module::Server::new($id, machines::$module::Limits::default()),)* }
            }

            /// Takes a completion, or gives it back if it is no front end's.
            pub fn done(&mut self, io: &mut ThreadIo, disks: &mut impl Disks<ThreadIo>, done: Done) -> Option<Done> {
                $(if self.$name.owns(done.token) {
                    self.$name.done(io, disks, done);
                    return None;
                })*
                Some(done)
            }

            /// Gives hosts their answers, and disks what hosts ask. True if a further call may find more without a completion
            /// in between: what a later front end asks may let go what an earlier one waits for.
            pub fn collect(&mut self, io: &mut ThreadIo, disks: &mut impl Disks<ThreadIo>) -> bool {
                let (mut more, mut earlier_idle) = (false, true);
                $(
                    // What one front end found answered may let another one's requests go on.
                    let answered = self.$name.collect(io, disks);
                    more |= answered && !earlier_idle;
                    earlier_idle &= self.$name.is_idle();
                )*
                let _ = earlier_idle;
                more || self.vhost.is_polling()
            }

            /// Drops the hosts of an export that is no longer on offer.
            pub fn close_export(&mut self, io: &mut ThreadIo, key: DiskKey) {
                $(self.$name.close_export(io, key);)*
            }

            /// Lets all hosts go.
            pub fn shutdown(&mut self, io: &mut ThreadIo) {
                $(FrontEnd::<ThreadIo>::shutdown(&mut self.$name, io);)*
            }

            /// No hosts are left.
            pub fn is_idle(&self) -> bool {
                true $(&& self.$name.is_idle())*
            }

            /// Users of each export that has any, by front end: one may be named more than once.
            pub fn status(&self) -> Vec<ExportStatus> {
                let mut all = Vec::new();
                $(all.extend(self.$name.status());)*
                all
            }
        }
    };
}

fronts! {
    /// NBD.
    nbd: nbd, 0x4000;
    /// vhost-user-blk.
    vhost: vhost, 0x4001;
    /// ublk.
    ublk: ublk, 0x5000;
}

/// Where hosts find an export, by every way in.
pub fn uris(proxy: &Proxy, role: Role, export: &str) -> Vec<String> {
    let (source, target) = (proxy.config.source.as_ref(), proxy.config.target.as_ref());
    let (nbd, vhost_user) = match role {
        Role::Source => (source.map(|role| &role.nbd), source.and_then(|role| role.vhost_user.as_deref())),
        Role::Target => (target.map(|role| &role.views), target.and_then(|role| role.vhost_user.as_deref())),
    };
    let nbd = convert::uris(nbd.map(Vec::as_slice).unwrap_or_default(), export);
    nbd.into_iter().chain(vhost::uri(vhost_user, export)).chain(proxy.ublk.uri(role, export)).collect()
}
