//! A coordinator on loopback with real TLS, and proxies that are scripts: what a real one does with disks and journals
//! is told here as if it had been done.

#![allow(dead_code, missing_docs)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use afterimage_controlplane::bundle::Bundle;
use afterimage_controlplane::grpc::rate::Rate;
use afterimage_controlplane::store::{Store, StoreError};
use afterimage_controlplane::{Config, Running, ServeError, client, start_over};
use afterimage_wire::v1::command::Command as Tell;
use afterimage_wire::v1::command_result::Outcome;
use afterimage_wire::v1::coordinator_message::Message as Down;
use afterimage_wire::v1::enrolment_client::EnrolmentClient;
use afterimage_wire::v1::failovers_client::FailoversClient;
use afterimage_wire::v1::groups_client::GroupsClient;
use afterimage_wire::v1::machines_client::MachinesClient;
use afterimage_wire::v1::operations_client::OperationsClient;
use afterimage_wire::v1::points_client::PointsClient;
use afterimage_wire::v1::policies_client::PoliciesClient;
use afterimage_wire::v1::proxies_client::ProxiesClient;
use afterimage_wire::v1::proxy_control_client::ProxyControlClient;
use afterimage_wire::v1::proxy_message::Message as Up;
use afterimage_wire::v1::status_client::StatusClient;
use afterimage_wire::v1::views_client::ViewsClient;
use afterimage_wire::v1::{self, *};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};

mod dying;

pub use dying::Death;
use dying::Dying;

pub const TENANT: &str = "tenants/default";
pub const SHOP: &str = "tenants/default/groups/shop";
pub const GOLD: &str = "tenants/default/policies/gold";

pub struct World {
    pub folder: tempfile::TempDir,
    pub running: Option<Running>,
    pub admin: Bundle,
    pub channel: Channel,
    /// Of the coordinator that runs.
    pub death: Arc<Death>,
}

async fn bring_up(folder: &std::path::Path, port: u16, death: &Arc<Death>) -> (Running, Bundle, Channel) {
    let config = Config::new(folder.join("coordinator"), ([127, 0, 0, 1], port).into());
    // Tests call as fast as they can.
    let calls = Rate { per_s: 0, ..Rate::default() };
    let config = Config { report_interval: Duration::from_millis(50), calls, ..config };
    let mut tries = 100;
    let running = loop {
        let front = |inner| -> Arc<dyn Store> { Arc::new(Dying::new(inner, death.clone())) };
        match start_over(config.clone(), front).await {
            // A connection of the life before may be ending still.
            Err(ServeError::Store(StoreError::InUse(_))) if tries > 0 => tries -= 1,
            started => break started.expect("the coordinator starts"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let admin = Bundle::load(running.admin_bundle()).unwrap();
    let channel = client::connect(&admin).await.unwrap();
    (running, admin, channel)
}

impl World {
    pub async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let death = Arc::default();
        let (running, admin, channel) = bring_up(folder.path(), 0, &death).await;
        Self { folder, running: Some(running), admin, channel, death }
    }

    /// Stops the coordinator and starts it again on the same port and folder.
    pub async fn restart(&mut self) {
        self.restart_after(|| ()).await;
    }

    /// The same, with something done while it is down.
    pub async fn restart_after(&mut self, meanwhile: impl FnOnce()) {
        let port = self.running.as_ref().unwrap().addresses()[0].port();
        self.running.take().unwrap().stop().await;
        meanwhile();
        self.death = Arc::default();
        let (running, admin, channel) = bring_up(self.folder.path(), port, &self.death).await;
        (self.running, self.admin, self.channel) = (Some(running), admin, channel);
    }

    pub async fn token(&self, role: Role, name: &str) -> String {
        let request = CreateJoinTokenRequest {
            parent: TENANT.into(),
            role: role.into(),
            name: name.into(),
            ttl_s: 0,
            ..Default::default()
        };
        EnrolmentClient::new(self.channel.clone()).create_join_token(request).await.unwrap().into_inner().token
    }

    pub async fn join(&self, role: Role, name: &str) -> Bundle {
        client::join(&self.token(role, name).await, None).await.unwrap()
    }

    pub async fn proxy(&self, name: &str, script: Script) -> FakeProxy {
        let bundle = self.join(Role::Proxy, name).await;
        FakeProxy::connect(bundle, script).await
    }

    pub async fn gold(&self) {
        self.gold_of(Policy { rpo_target_us: Some(500_000), ..Policy::default() }).await;
    }

    /// The policy of the group, with these promises.
    pub async fn gold_of(&self, policy: Policy) {
        let request = CreatePolicyRequest {
            parent: TENANT.into(),
            policy_id: "gold".into(),
            policy: Some(policy),
            ..Default::default()
        };
        self.policies().create_policy(request).await.unwrap();
    }

    /// A policy, a group of two disks, and its two proxies, protected.
    pub async fn shop(&self) -> (FakeProxy, FakeProxy) {
        let source = self.proxy("src", Script::default()).await;
        let target = self.proxy("dr", Script::default()).await;
        self.gold().await;
        self.groups().create_group(shop_request()).await.unwrap();
        let mut world = target.desired.subscribe();
        world.wait_for(|d| d.targets.len() == 1).await.unwrap();
        self.wait_phase(Phase::Protected).await;
        (source, target)
    }

    pub async fn wait_phase(&self, phase: Phase) -> GroupStatus {
        for _ in 0..200 {
            let status = self.status().await;
            if status.phase() == phase {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        panic!("the group does not become {phase:?}: {:?}", self.status().await);
    }

    pub async fn status(&self) -> GroupStatus {
        let request = GetStatusRequest { parent: SHOP.into() };
        let mut snapshot = self.statuses().get_status(request).await.unwrap().into_inner();
        snapshot.groups.remove(0)
    }

    pub async fn finish(&self, operation: &str) -> Operation {
        let request = WaitOperationRequest { name: operation.into(), timeout_ms: 20_000 };
        self.operations().wait_operation(request).await.unwrap().into_inner()
    }

    pub fn policies(&self) -> PoliciesClient<Channel> {
        PoliciesClient::new(self.channel.clone())
    }
    pub fn groups(&self) -> GroupsClient<Channel> {
        GroupsClient::new(self.channel.clone())
    }
    pub fn proxies(&self) -> ProxiesClient<Channel> {
        ProxiesClient::new(self.channel.clone())
    }
    pub fn points(&self) -> PointsClient<Channel> {
        PointsClient::new(self.channel.clone())
    }
    pub fn failovers(&self) -> FailoversClient<Channel> {
        FailoversClient::new(self.channel.clone())
    }
    pub fn operations(&self) -> OperationsClient<Channel> {
        OperationsClient::new(self.channel.clone())
    }
    pub fn machines(&self) -> MachinesClient<Channel> {
        MachinesClient::new(self.channel.clone())
    }
    pub fn views(&self) -> ViewsClient<Channel> {
        ViewsClient::new(self.channel.clone())
    }
    pub fn statuses(&self) -> StatusClient<Channel> {
        StatusClient::new(self.channel.clone())
    }
}

pub fn proxy_name(id: &str) -> String {
    format!("{TENANT}/proxies/{id}")
}

pub fn shop_request() -> CreateGroupRequest {
    let disk = |name: &str| Disk { name: name.into(), path: format!("/disks/{name}"), ..Disk::default() };
    CreateGroupRequest {
        parent: TENANT.into(),
        group_id: "shop".into(),
        group: Some(Group {
            policy: GOLD.into(),
            source: proxy_name("src"),
            target: proxy_name("dr"),
            disks: vec![disk("data"), disk("wal")],
            ..Group::default()
        }),
        validate_only: false,
        request_id: String::new(),
    }
}

pub fn failover_request(to: point_choice::At) -> StartFailoverRequest {
    StartFailoverRequest { group: SHOP.into(), to: Some(PointChoice { at: Some(to) }), ..Default::default() }
}

pub fn unconfirmed(to: point_choice::At) -> StartFailoverRequest {
    StartFailoverRequest { unconfirmed: true, confirm_name: "shop".into(), ..failover_request(to) }
}

/// What a scripted proxy says to a command, instead of doing it.
pub type Say = Arc<dyn Fn(&Tell) -> Option<Option<Outcome>> + Send + Sync>;

/// How a proxy behaves. `say`: `Some(Some(x))` answers x, `Some(None)` answers never, `None` does it.
#[derive(Clone, Default)]
pub struct Script {
    pub say: Option<Say>,
    pub rpo_us: u64,
    pub data_address: Option<String>,
    pub observed_term: u64,
    pub observed_version: u64,
    pub site: String,
    pub local_failovers: Vec<LocalFailover>,
    /// Bytes free of a TiB; none: it does not say.
    pub free: Option<u64>,
    /// Survives the session: what the journal holds.
    pub journal: Arc<Mutex<Journal>>,
}

#[derive(Default)]
pub struct Journal {
    pub generation: u64,
    pub views: HashMap<String, OpenView>,
    pub held: HashMap<String, bool>,
    /// Machines that are on, by what they are called.
    pub on: std::collections::BTreeSet<String>,
    /// Streams whose disks have been let go: not running while they are to be held.
    pub released: Vec<String>,
    /// Records that the keeper holds above 100.
    pub more: u64,
    /// Answers to a merge before the one that it is complete.
    pub merges_left: u64,
    /// What sources report of their synchronisation.
    pub sync: Option<SyncProgress>,
}

pub struct FakeProxy {
    pub bundle: Bundle,
    pub script: Script,
    pub told: Arc<Mutex<Vec<Tell>>>,
    pub desired: Arc<tokio::sync::watch::Sender<DesiredState>>,
    pub term: u64,
    task: JoinHandle<()>,
}

pub fn register(bundle: &Bundle, script: &Script) -> Register {
    Register {
        name: bundle.name.clone(),
        uid: bundle.uid.clone(),
        software_version: "test".into(),
        data_address: script.data_address.clone().unwrap_or_else(|| format!("{}.example:7070", bundle.name)),
        nbd_addresses: vec!["unix:/run/nbd".into()],
        capabilities: ["source", "target", "machine-hook", "machine-qemu", "machine-check", "scripts"]
            .map(str::to_owned)
            .into(),
        boot_id: "boot".into(),
        observed_version: script.observed_version,
        observed_term: script.observed_term,
        site: script.site.clone(),
        local_failovers: script.local_failovers.clone(),
    }
}

fn up(message: Up) -> ProxyMessage {
    ProxyMessage { message: Some(message) }
}

pub async fn open_session(
    bundle: &Bundle,
) -> (mpsc::Sender<ProxyMessage>, Result<tonic::Streaming<CoordinatorMessage>, Status>) {
    let channel = client::connect(bundle).await.expect("the port answers");
    let (sender, receiver) = mpsc::channel(64);
    let stream = ProxyControlClient::new(channel).session(ReceiverStream::new(receiver)).await;
    (sender, stream.map(tonic::Response::into_inner))
}

impl FakeProxy {
    pub async fn connect(bundle: Bundle, script: Script) -> Self {
        let (sender, stream) = open_session(&bundle).await;
        let mut stream = stream.unwrap();
        sender.send(up(Up::Register(register(&bundle, &script)))).await.unwrap();
        let first = stream.message().await.unwrap().unwrap();
        let Some(Down::Registered(registered)) = first.message else { panic!("{first:?}") };
        let desired = Arc::new(tokio::sync::watch::channel(DesiredState::default()).0);
        let told = Arc::new(Mutex::new(Vec::new()));
        let task = tokio::spawn(run(script.clone(), sender, stream, desired.clone(), told.clone()));
        Self { bundle, script, told, desired, term: registered.term, task }
    }

    /// As SIGKILL: the connection is gone at once.
    pub async fn kill(self) -> (Bundle, Script) {
        self.task.abort();
        let _ = self.task.await;
        (self.bundle, self.script)
    }

    pub fn told(&self) -> Vec<Tell> {
        self.told.lock().unwrap().clone()
    }
}

async fn run(
    script: Script,
    sender: mpsc::Sender<ProxyMessage>,
    mut stream: tonic::Streaming<CoordinatorMessage>,
    desired: Arc<tokio::sync::watch::Sender<DesiredState>>,
    told: Arc<Mutex<Vec<Tell>>>,
) {
    let mut tick = tokio::time::interval(Duration::from_millis(50));
    loop {
        tokio::select! {
            _ = tick.tick() => {
                let report = report(&script, &desired.borrow());
                if sender.send(up(Up::Report(report))).await.is_err() {
                    return;
                }
            }
            message = stream.message() => match message {
                Ok(Some(CoordinatorMessage { message: Some(Down::Desired(state)) })) => {
                    desired.send_replace(state);
                }
                Ok(Some(CoordinatorMessage { message: Some(Down::Command(command)) })) => {
                    let tell = command.command.unwrap();
                    told.lock().unwrap().push(tell.clone());
                    let said = script.say.as_ref().and_then(|say| say(&tell));
                    let outcome = said.unwrap_or_else(|| Some(obey(&script, &tell, &desired.borrow())));
                    if let Some(outcome) = outcome {
                        let result = CommandResult { id: command.id, outcome: Some(outcome) };
                        if sender.send(up(Up::Result(result))).await.is_err() {
                            return;
                        }
                    }
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return,
            },
        }
    }
}

fn disks_of(state: &DesiredState, stream: &str) -> Vec<(String, String)> {
    let target = state.targets.iter().find(|t| t.stream_uid == stream);
    target.map(|t| t.disks.iter().map(|d| (d.uid.clone(), d.name.clone())).collect()).unwrap_or_default()
}

/// The target holds records 1 to 100; every tenth is a cut; 50 is damaged.
fn point(state: &DesiredState, stream: &str, seq: u64) -> v1::Point {
    v1::Point {
        seq,
        cut: seq.is_multiple_of(10).then_some(seq / 10),
        wall_ns: seq * 1_000_000_000,
        disks: disks_of(state, stream).into_iter().map(|(uid, _)| uid).collect(),
        damage: if seq == 50 { "segment 3 fails its checksum".into() } else { String::new() },
        ..v1::Point::default()
    }
}

fn error(kind: CommandErrorKind, message: &str) -> Outcome {
    Outcome::Error(CommandError { kind: kind.into(), message: message.into() })
}

fn obey(script: &Script, tell: &Tell, state: &DesiredState) -> Outcome {
    let mut journal = script.journal.lock().unwrap();
    match tell {
        Tell::InspectDisk(d) if d.path.starts_with("/disks/") => {
            Outcome::Disk(DiskFound { size_bytes: 1 << 30, block_bytes: 512, physical_block_bytes: 4096 })
        }
        Tell::InspectDisk(_) => error(CommandErrorKind::NotFound, "no such file"),
        Tell::Fence(f) => {
            journal.held.insert(f.stream_uid.clone(), f.hold);
            if f.hold { Outcome::Fenced(Fenced { last_seq: 100 }) } else { Outcome::Done(Done {}) }
        }
        Tell::RaiseGeneration(r) => {
            journal.generation = journal.generation.max(r.at_least);
            Outcome::Generation(GenerationRaised { generation: journal.generation, zero_loss: false })
        }
        Tell::ResolvePoint(r) => match r.at.and_then(|a| a.at) {
            Some(point_choice::At::Latest(_)) => Outcome::Point(point(state, &r.stream_uid, 100)),
            Some(point_choice::At::Seq(seq)) if seq <= 100 => Outcome::Point(point(state, &r.stream_uid, seq)),
            Some(point_choice::At::Cut(cut)) if (1..=10).contains(&cut) => {
                Outcome::Point(point(state, &r.stream_uid, cut * 10))
            }
            Some(point_choice::At::TimeNs(ns)) if ns >= 1_000_000_000 => {
                Outcome::Point(point(state, &r.stream_uid, (ns / 1_000_000_000).min(100)))
            }
            _ => error(CommandErrorKind::NotFound, "no such point: held are 1 to 100"),
        },
        Tell::ListPoints(l) => {
            let step = if l.cuts_only { 10 } else { 1 };
            let seqs = (1..=100u64).filter(|s| *s >= l.from_seq && s.is_multiple_of(step));
            let points: Vec<_> = seqs.take(l.limit as usize).map(|s| point(state, &l.stream_uid, s)).collect();
            let next_seq = points.last().map_or(0, |p| if p.seq < 100 { p.seq + 1 } else { 0 });
            Outcome::Points(PointList { points, next_seq, summary: None })
        }
        Tell::OpenView(v) => {
            journal.views.insert(v.view.clone(), v.clone());
            let all = disks_of(state, &v.stream_uid);
            let shown = all.iter().filter(|(uid, _)| v.disk_uids.is_empty() || v.disk_uids.contains(uid));
            let exports = shown.map(|(uid, name)| ViewExport {
                disk: name.clone(),
                disk_uid: uid.clone(),
                export_name: format!("{}/{name}", v.view),
                uris: vec![format!("nbd+unix:///{}/{name}?socket=/run/nbd", v.view)],
                size_bytes: 1 << 30,
            });
            Outcome::View(ViewOpened { exports: exports.collect() })
        }
        Tell::CloseView(c) => {
            journal.views.remove(&c.view);
            Outcome::Done(Done {})
        }
        Tell::LabelCut(c) => {
            Outcome::Point(v1::Point { label: c.label.clone(), cut: Some(11), ..point(state, &c.stream_uid, 101) })
        }
        Tell::Unprotect(_) | Tell::DropStream(_) | Tell::LeaveDisk(_) => Outcome::Done(Done {}),
        Tell::InspectBranch(_) => Outcome::Branch(Branch::default()),
        Tell::Observe(_) => Outcome::Observed(state.clone()),
        Tell::StartInstance(s) => {
            journal.on.insert(called(&s.machine));
            machine(MachinePower::On, false)
        }
        Tell::StopInstance(s) => {
            journal.on.remove(&called(&s.machine));
            machine(MachinePower::Off, false)
        }
        Tell::CheckInstance(_) => Outcome::Done(Done {}),
        Tell::ProbeInstance(p) => match journal.on.contains(&called(&p.machine)) {
            true => machine(MachinePower::On, true),
            false => machine(MachinePower::Off, false),
        },
        Tell::RunScript(_) | Tell::LookAt(_) => Outcome::Checked(Checked { yes: true, detail: String::new() }),
        Tell::ReleaseDisks(r) => {
            journal.released.push(r.stream_uid.clone());
            journal.held.remove(&r.stream_uid);
            Outcome::Done(Done {})
        }
        Tell::MergeStream(_) => {
            let complete = journal.merges_left == 0;
            journal.merges_left = journal.merges_left.saturating_sub(1);
            let merged_bytes = if complete { 4096 } else { 1024 };
            Outcome::Merged(Merged { complete, merged_bytes, total_bytes: 4096, written_bytes: merged_bytes })
        }
    }
}

fn called(machine: &Option<MachineRef>) -> String {
    machine.clone().unwrap_or_default().instance
}

/// How a machine stands.
pub fn machine(power: MachinePower, ready: bool) -> Outcome {
    Outcome::Machine(MachineState { power: power.into(), ready, detail: String::new() })
}

fn report(script: &Script, state: &DesiredState) -> Report {
    let journal = script.journal.lock().unwrap();
    let source = |g: &SourceGroup| {
        let held = g.hold || journal.held.get(&g.stream_uid).copied().unwrap_or_default();
        let disk = |d: &SourceDisk| SourceDiskReport {
            disk_uid: d.uid.clone(),
            state: if held { "held" } else { "serving" }.into(),
            generation: d.generation,
            ..SourceDiskReport::default()
        };
        SourceGroupReport {
            stream_uid: g.stream_uid.clone(),
            link: LinkState::Up.into(),
            rung: Rung::Streaming.into(),
            held,
            captured_seq: 100,
            acked_seq: 100,
            rpo_now_us: script.rpo_us,
            lease_ms: g.lease_ms,
            paused: g.paused,
            sync: journal.sync,
            disks: g.disks.iter().map(disk).collect(),
            ..SourceGroupReport::default()
        }
    };
    let runs = |g: &&SourceGroup| !(g.hold && journal.released.contains(&g.stream_uid));
    let target = |t: &TargetStream| TargetStreamReport {
        stream_uid: t.stream_uid.clone(),
        connected: true,
        durable_seq: 100 + journal.more,
        points: Some(PointSummary {
            oldest: Some(point(state, &t.stream_uid, 1)),
            newest: Some(point(state, &t.stream_uid, 100 + journal.more)),
            count: 100,
            cuts: 10,
        }),
        ..TargetStreamReport::default()
    };
    Report {
        observed_version: state.version,
        sources: state.sources.iter().filter(runs).map(source).collect(),
        targets: state.targets.iter().map(target).collect(),
        room: script.free.map(|free_bytes| TargetRoom {
            total_bytes: 1 << 40,
            free_bytes,
            reserve_bytes: 1 << 30,
            default_budget_bytes: 16 << 30,
        }),
        ..Report::default()
    }
}

/// The code of a refusal.
pub fn code<T: std::fmt::Debug>(answer: Result<T, Status>) -> Code {
    answer.expect_err("this has to be refused").code()
}
