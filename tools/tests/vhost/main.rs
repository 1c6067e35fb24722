//! A driver without a virtual machine, at the socket of a running proxy. Its side of the protocol and of the virtqueues is
//! not ours but that of the `vhost` and `virtio-queue` crates, so that no mistake stands on both sides.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::{AvailRing, DescriptorTable, UsedRing};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const DISK: u64 = 16 << 20;
const MEMORY: usize = 4 << 20;
const SIZE: u16 = 64;
/// Requests under way together; each has three descriptors and a place for its data.
const SLOTS: u16 = 16;
const SLOT_BYTES: u64 = 64 * 1024;
/// Where the guest sees its memory, and what lies where in it.
const BASE: u64 = 0x10_0000_0000;
const TABLE: u64 = BASE;
const AVAIL: u64 = BASE + 0x1000;
const USED: u64 = BASE + 0x2000;
const DATA: u64 = BASE + (1 << 20);
const WAIT: Duration = Duration::from_secs(30);

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;

/// A proxy that serves one raw file; killed when dropped.
struct Proxy {
    dir: tempfile::TempDir,
    child: Child,
}

impl Proxy {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        File::create(dir.path().join("disk.raw")).unwrap().set_len(DISK).unwrap();
        let child = Self::spawn(dir.path());
        Self { dir, child }
    }

    fn spawn(dir: &Path) -> Child {
        let log = File::options().create(true).append(true).open(dir.join("log")).unwrap();
        Command::new(env!("CARGO_BIN_EXE_afterimage"))
            .args(["proxy", "--memory", "64MiB", "--serve"])
            .arg(format!("shop/data={}", dir.join("disk.raw").display()))
            .arg("--vhost-user")
            .arg(dir.join("vhost"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn start(&mut self) {
        self.child = Self::spawn(self.dir.path());
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("vhost/shop-data.sock")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// How often its threads have gone to sleep, but for those of the kernel's own, which look every 5 s whether they are
    /// to end once there was a flush.
    fn sleeps(&self) -> u64 {
        let tasks =
            std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap().map(|task| task.unwrap().path());
        let ours = tasks.filter(|task| !std::fs::read_to_string(task.join("comm")).unwrap().starts_with("iou-"));
        let count = |task: PathBuf| {
            let status = std::fs::read_to_string(task.join("status")).unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
            line.trim().parse::<u64>().unwrap()
        };
        let counts: Vec<u64> = ours.map(count).collect();
        assert!(counts.len() >= 3, "the service's, the data and the connection's threads");
        counts.iter().sum()
    }

    /// How long the service's thread waits, milliseconds; -1: until something happens. None while it does something else.
    fn patience(&self) -> Option<i32> {
        let call = std::fs::read_to_string(format!("/proc/{}/syscall", self.child.id())).unwrap();
        let words: Vec<&str> = call.split_ascii_whitespace().collect();
        // `epoll_wait` of x86-64, `epoll_pwait` of both.
        let waits = matches!(words.first(), Some(&("232" | "281" | "22"))) && words.len() > 4;
        waits.then(|| u64::from_str_radix(words[4].trim_start_matches("0x"), 16).unwrap() as u32 as i32)
    }

    fn disk(&self) -> Vec<u8> {
        std::fs::read(self.dir.path().join("disk.raw")).unwrap()
    }

    /// Connects as soon as somebody listens.
    fn stream(&self) -> UnixStream {
        let end = Instant::now() + WAIT;
        loop {
            match UnixStream::connect(self.socket()) {
                Ok(stream) => return stream,
                Err(error) => assert!(Instant::now() < end, "{error}\n{}", self.log()),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A guest: its memory, a queue in it, and which requests are under way.
struct Guest {
    /// Both for as long as the test runs.
    memory: &'static GuestMemoryMmap,
    table: DescriptorTable<'static, GuestMemoryMmap>,
    avail_ring: AvailRing<'static, GuestMemoryMmap>,
    used_ring: UsedRing<'static, GuestMemoryMmap>,
    kick: EventFd,
    call: EventFd,
    avail: u16,
    used: u16,
    inflight: Option<(VhostUserInflight, File)>,
    front: Option<Frontend>,
}

impl Guest {
    fn new() -> Self {
        let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, MEMORY as u64).unwrap();
        let ranges = [(GuestAddress(BASE), MEMORY, Some(FileOffset::new(File::from(file), 0)))];
        let memory: &'static _ = Box::leak(Box::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap()));
        Self {
            memory,
            table: DescriptorTable::new(memory, GuestAddress(TABLE), SIZE),
            avail_ring: AvailRing::new(memory, GuestAddress(AVAIL), SIZE),
            used_ring: UsedRing::new(memory, GuestAddress(USED), SIZE),
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
            avail: 0,
            used: 0,
            inflight: None,
            front: None,
        }
    }

    fn user(&self, at: u64) -> u64 {
        self.memory.get_host_address(GuestAddress(at)).unwrap() as u64
    }

    /// Says everything to the proxy that it has to know.
    fn connect(&mut self, proxy: &Proxy) {
        let mut front = Frontend::from_stream(proxy.stream(), 1);
        front.set_owner().unwrap();
        let offered = front.get_features().unwrap();
        let wanted = 1 << 9 | 1 << 13 | 1 << 14 | 1 << 30 | 1 << 32; // FLUSH, DISCARD, WRITE_ZEROES, protocol, VERSION_1
        assert_eq!(offered & wanted, wanted);
        front.set_features(wanted).unwrap();
        let protocol = front.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE;
        assert!(protocol.contains(wanted));
        front.set_protocol_features(wanted).unwrap();
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert!(front.get_queue_num().unwrap() >= 1);
        if self.inflight.is_none() {
            let wanted = VhostUserInflight { num_queues: 1, queue_size: SIZE, ..VhostUserInflight::default() };
            self.inflight = Some(front.get_inflight_fd(&wanted).unwrap());
        }
        let (inflight, file) = self.inflight.as_ref().unwrap();
        front.set_inflight_fd(inflight, file.as_raw_fd()).unwrap();
        let regions: Vec<_> =
            self.memory.iter().map(|r| VhostUserMemoryRegionInfo::from_guest_region(r).unwrap()).collect();
        front.set_mem_table(&regions).unwrap();
        let config = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: self.user(TABLE),
            used_ring_addr: self.user(USED),
            avail_ring_addr: self.user(AVAIL),
            log_addr: None,
        };
        front.set_vring_num(0, SIZE).unwrap();
        front.set_vring_base(0, self.used).unwrap();
        front.set_vring_addr(0, &config).unwrap();
        front.set_vring_kick(0, &self.kick).unwrap();
        front.set_vring_call(0, &self.call).unwrap();
        front.set_vring_enable(0, true).unwrap();
        self.front = Some(front);
    }

    fn data(slot: u16) -> GuestAddress {
        GuestAddress(DATA + u64::from(slot) * SLOT_BYTES)
    }

    /// Makes a request available in a slot that is free.
    fn send(&mut self, slot: u16, kind: u32, sector: u64, payload: &[u8], room: usize) {
        let at = Self::data(slot);
        let mut head = kind.to_le_bytes().to_vec();
        head.extend_from_slice(&[0; 4]);
        head.extend_from_slice(&sector.to_le_bytes());
        self.memory.write_slice(&head, at).unwrap();
        let body = GuestAddress(at.0 + 512);
        let (len, write) = if payload.is_empty() { (room, 2) } else { (payload.len(), 0) };
        self.memory.write_slice(payload, body).unwrap();
        let status = GuestAddress(at.0 + SLOT_BYTES - 1);
        self.memory.write_obj(0xccu8, status).unwrap();
        let first = slot * 3;
        let next = if len == 0 { first + 2 } else { first + 1 };
        let store = |index, desc| self.table.store(index, RawDescriptor::from(desc)).unwrap();
        store(first, Descriptor::new(at.0, 16, 1, next));
        store(first + 1, Descriptor::new(body.0, len as u32, write | 1, first + 2));
        store(first + 2, Descriptor::new(status.0, 1, 2, 0));
        self.avail_ring.ring().ref_at(usize::from(self.avail % SIZE)).unwrap().store(first.to_le());
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.avail_ring.idx().store(self.avail.wrapping_add(1).to_le());
        self.avail = self.avail.wrapping_add(1);
    }

    /// The slot and status of the next request that has ended.
    fn next(&mut self, proxy: &Proxy) -> (u16, u8) {
        let end = Instant::now() + WAIT;
        loop {
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            if u16::from_le(self.used_ring.idx().load()) != self.used {
                let slot = self.used_ring.ring().ref_at(usize::from(self.used % SIZE)).unwrap().load().id() as u16 / 3;
                self.used = self.used.wrapping_add(1);
                let status = self.memory.read_obj(GuestAddress(Self::data(slot).0 + SLOT_BYTES - 1)).unwrap();
                return (slot, status);
            }
            assert!(Instant::now() < end, "a request does not end\n{}", proxy.log());
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn ask(&mut self, proxy: &Proxy, kind: u32, sector: u64, payload: &[u8], room: usize) -> (u8, Vec<u8>) {
        self.send(0, kind, sector, payload, room);
        self.kick.write(1).unwrap();
        let (slot, status) = self.next(proxy);
        assert_eq!(slot, 0);
        let mut data = vec![0; room];
        self.memory.read_slice(&mut data, GuestAddress(Self::data(0).0 + 512)).unwrap();
        (status, data)
    }
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 24) as u8
    };
    (0..len).map(|_| next()).collect()
}

#[test]
fn a_driver_reads_what_it_wrote_and_the_file_has_it() {
    let proxy = Proxy::new();
    let mut guest = Guest::new();
    guest.connect(&proxy);
    for (sector, len) in [(0u64, 512usize), (7, 4096), (1001, 32 * 1024), (DISK / 512 - 1, 512)] {
        let data = pattern(sector + 1, len);
        assert_eq!(guest.ask(&proxy, OUT, sector, &data, 0).0, 0);
        assert!(guest.ask(&proxy, IN, sector, &[], len) == (0, data.clone()));
        assert_eq!(guest.ask(&proxy, FLUSH, 0, &[], 0).0, 0);
        let at = sector as usize * 512;
        assert!(proxy.disk()[at..at + len] == data[..]);
    }
    assert_eq!(guest.ask(&proxy, IN, DISK / 512, &[], 512).0, 1, "past the end");
    let (status, id) = guest.ask(&proxy, GET_ID, 0, &[], 20);
    assert!(status == 0 && id.iter().all(|b| b.is_ascii_hexdigit()), "{id:?}");
    let range: Vec<u8> = [0u64.to_le_bytes(), 8u64.to_le_bytes()].concat();
    assert_eq!(guest.ask(&proxy, DISCARD, 0, &range, 0).0, 0);
    // The driver is called, by its event counter.
    assert!(guest.call.read().unwrap() > 0);

    let mut front = guest.front.take().unwrap();
    let (_, config) = front.get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60]).unwrap();
    assert_eq!(config[..8], (DISK / 512).to_le_bytes());
    assert_eq!((&config[20..24], config[32]), (&512u32.to_le_bytes()[..], 1));
    front.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    assert!(front.set_config(0, VhostUserConfigFlags::WRITABLE, &[0]).is_err(), "the size is not the driver's");
    assert!(front.get_max_mem_slots().unwrap() >= 8);
    assert_eq!(front.get_vring_base(0).unwrap(), u32::from(guest.used));
    front.reset_device().unwrap();
}

#[test]
fn a_guest_that_asks_nothing_wakes_nobody() {
    let proxy = Proxy::new();
    let mut guest = Guest::new();
    guest.connect(&proxy);
    assert_eq!(guest.ask(&proxy, OUT, 0, &pattern(1, 4096), 0).0, 0);
    std::thread::sleep(Duration::from_secs(1));
    let before = proxy.sleeps();
    std::thread::sleep(Duration::from_secs(11));
    assert_eq!(proxy.sleeps(), before);
    assert_eq!(proxy.patience(), Some(-1), "nor would anybody be woken later");
    // And it is not deaf.
    assert_eq!(guest.ask(&proxy, FLUSH, 0, &[], 0).0, 0);
    assert!(proxy.sleeps() > before);
}

#[test]
fn a_proxy_that_is_killed_under_load_loses_and_doubles_nothing() {
    let mut proxy = Proxy::new();
    let mut guest = Guest::new();
    guest.connect(&proxy);
    let mut expected = vec![0; DISK as usize];
    let mut again = 0;
    for round in 0..12u64 {
        // Each slot writes to a place of its own, twice in a row: the second write must be what stays.
        let mut free: Vec<u16> = (0..SLOTS).rev().collect();
        let mut count = 0;
        let end = 200 + round * 37;
        let mut under_way: Vec<Option<(usize, Vec<u8>)>> = vec![None; usize::from(SLOTS)];
        let mut killed = false;
        while count < end || free.len() < usize::from(SLOTS) {
            while count < end
                && let Some(slot) = free.pop()
            {
                let sector = u64::from(slot) * 128 + count % 3;
                let data = pattern(round << 32 | count, 1024);
                guest.send(slot, OUT, sector, &data, 0);
                under_way[usize::from(slot)] = Some((sector as usize * 512, data));
                count += 1;
            }
            guest.kick.write(1).unwrap();
            if count > end / 2 && !std::mem::replace(&mut killed, true) {
                std::thread::sleep(Duration::from_micros(100 * round));
                proxy.kill();
                again += guest.avail.wrapping_sub(guest.used);
                guest.front = None;
                proxy.start();
                guest.connect(&proxy);
            }
            let (slot, status) = guest.next(&proxy);
            assert_eq!(status, 0);
            let (at, data) = under_way[usize::from(slot)].take().expect("each ends once");
            expected[at..at + data.len()].copy_from_slice(&data);
            free.push(slot);
        }
        assert_eq!(guest.avail, guest.used, "as many ends as requests");
    }
    assert!(again > 0, "something was under way when it was killed");
    assert_eq!(guest.ask(&proxy, FLUSH, 0, &[], 0).0, 0);
    assert!(proxy.disk() == expected);
}

#[test]
fn whoever_talks_nonsense_is_let_go_and_the_next_one_served() {
    let proxy = Proxy::new();
    let message = |request: u32, flags: u32, payload: &[u8]| {
        let mut out = [request, flags, payload.len() as u32].map(u32::to_ne_bytes).concat();
        out.extend_from_slice(payload);
        out
    };
    let mut long = message(1, 1, &[]);
    long[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
    let index = [0u8; 8];
    for bytes in
        [vec![0xff; 64], long, message(1, 2, &[]), message(99, 1, &[]), message(8, 1, &[1; 3]), message(5, 1, &[7; 40])]
    {
        let mut stream = proxy.stream();
        stream.write_all(&bytes).unwrap();
        stream.set_read_timeout(Some(WAIT)).unwrap();
        assert_eq!(std::io::Read::read(&mut stream, &mut [0; 64]).unwrap_or(0), 0, "{bytes:?}");
    }
    // A file where an event counter belongs; memory that its file does not have.
    let file = File::open(proxy.dir.path().join("disk.raw")).unwrap();
    let mut table = 1u64.to_ne_bytes().to_vec();
    table.extend_from_slice(&[0u64, DISK * 2, 0, 0].map(u64::to_ne_bytes).concat());
    for bytes in [message(12, 1, &index), message(5, 1, &table)] {
        let mut stream = proxy.stream();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
        let fds = [std::os::fd::AsFd::as_fd(&file)];
        control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds));
        let part = [std::io::IoSlice::new(&bytes)];
        rustix::net::sendmsg(&stream, &part, &mut control, rustix::net::SendFlags::empty()).unwrap();
        stream.set_read_timeout(Some(WAIT)).unwrap();
        assert_eq!(std::io::Read::read(&mut stream, &mut [0; 64]).unwrap_or(0), 0);
    }
    // What has a reply of its own that can say "no" is refused by that, whether an answer was asked for or not.
    let mut stream = proxy.stream();
    stream.set_read_timeout(Some(WAIT)).unwrap();
    let mut talk = |bytes: &[u8], len: usize| {
        stream.write_all(bytes).unwrap();
        let mut reply = vec![0; 12 + len];
        std::io::Read::read_exact(&mut stream, &mut reply).unwrap();
        assert_eq!(reply[4..12], [5u32, len as u32].map(u32::to_ne_bytes).concat());
        reply.split_off(12)
    };
    talk(&message(16, 1 | 8, &(1u64 << 3 | 1 << 9 | 1 << 12).to_ne_bytes()), 8);
    for flags in [1, 1 | 8] {
        let range = [200u32, 60, 0].map(u32::to_ne_bytes).concat();
        assert_eq!(talk(&message(24, flags, &range), 12), [200u32, 0, 0].map(u32::to_ne_bytes).concat());
        let queues = [0u64, 0, 9999].map(u64::to_ne_bytes).concat();
        assert_eq!(talk(&message(31, flags, &queues), 24), [0; 24]);
    }
    assert_eq!(talk(&message(18, 1 | 8, &[0xff; 8]), 8), 1u64.to_ne_bytes());
    drop(stream);
    let mut guest = Guest::new();
    guest.connect(&proxy);
    assert_eq!(guest.ask(&proxy, FLUSH, 0, &[], 0).0, 0);
    let log = proxy.log();
    assert!(!log.contains("panicked"), "{log}");
}

#[test]
fn a_folder_that_cannot_hold_sockets_is_refused_by_name() {
    for dir in ["vhost", &format!("/{}", "x".repeat(101))] {
        let output = Command::new(env!("CARGO_BIN_EXE_afterimage"))
            .args(["proxy", "--serve", "d=/nonexistent", "--vhost-user", dir])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains("`source.vhost_user`") && text.contains("an absolute path"), "{text}");
    }
}
