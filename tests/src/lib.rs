//! The simulator: a source, a target and the network between them in one thread, from one seed.
//!
//! ```text
//!  workload ──requests──▶ Source ══frames══▶ Target ──▶ views
//!     │                     │ simulated disk    │ simulated disk
//!     ▼                     ▼                   ▼
//!  history (what the host   snapshots at        tap (what the journal says, read
//!  may expect to see)       each restart        with the policy key, not by the target)
//! ```
//! Two oracles that share no code with what they judge: [`history`] knows only what a host knows (which requests were
//! issued and answered, and when) and decides whether a disk's content is one that a crash could have left; [`tap`]
//! reads the journal and knows each record. [`plan`] rolls what happens in a seed; [`run`] plays it and checks as it goes
//! ([`check`], [`limits`]), with [`trouble`] on the way and one of several [`ending`]s; [`shrink`] cuts a plan that fails
//! down to what the failure needs.

pub mod check;
pub mod coordinate;
pub mod ending;
pub mod front;
pub mod history;
pub mod limits;
#[cfg(feature = "mutants")]
pub mod mutants;
pub mod pinned;
pub mod plan;
pub mod play;
pub mod run;
pub mod shrink;
pub mod stage;
pub mod tap;
pub mod trace;
pub mod trouble;
pub mod workload;
