//! The path of a write: capture → seal → ship → receive → journal → fold → view.
//!
//! Every stage is a synchronous machine behind the one [`io::Io`] seam; the same code runs on the ring and under the
//! simulator.

// The allow-list of `unsafe`: the ring, its buffers and memory shared with guests, nothing else.
#[allow(unsafe_code)]
pub mod io;

/// Whether a deliberate bug is on; see [`mutant`].
macro_rules! mutant {
    ($name:ident) => {
        $crate::mutant::on($crate::mutant::Mutant::$name)
    };
}

pub mod host;
mod loopback;
pub mod mutant;
pub mod seal;

// The way of a write on the source …
pub mod capture;
pub mod intent;
pub mod nbd;
pub mod overlap;
pub mod resync;
pub mod rpo;
pub mod sealers;
pub mod ship;
pub mod source;
pub(crate) mod spill;
pub mod ublk;
pub mod vhost;

// … and on the target.
pub mod compare;
mod damage;
pub mod delta;
pub mod fold;
pub mod index;
pub mod journal;
pub mod receive;
pub mod reverse;
mod scrub;
mod shelf;
pub mod target;
pub mod timeline;
pub mod view;
