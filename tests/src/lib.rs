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
//! reads the journal and knows each record. [`run`] plays one seed and checks; [`plan`] rolls what happens in it.

pub mod check;
pub mod history;
pub mod plan;
pub mod run;
pub mod stage;
pub mod tap;
pub mod workload;
