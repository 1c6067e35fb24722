//! Real clients on a real socket: libnbd's tools, qemu's, fio, against a disk in memory.
//!
//! A client that is not installed is skipped, and says so; with `CI` set in the environment that is a failure.

#[path = "nbd/bed.rs"]
#[allow(dead_code)]
mod bed;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use afterimage_dataplane::host::FrontEnd as _;
use afterimage_dataplane::io::ring::{Ring, RingConfig};
use afterimage_dataplane::io::{Io, Pool};
use afterimage_dataplane::nbd::{Counters, Limits, Server};
use bed::{MemDisk, MemDisks};

/// A server thread on a socket in a folder of its own.
struct Served {
    folder: tempfile::TempDir,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<(MemDisks, Counters)>>,
}

impl Served {
    fn new(disks: Vec<MemDisk>) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let listener = UnixListener::bind(folder.path().join("nbd")).expect("a socket");
        listener.set_nonblocking(true).expect("a listener that does not block");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || serve(&listener, disks, &stopped));
        Self { folder, stop, thread: Some(thread) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.path("nbd").display())
    }

    /// Stops and gives the disks back.
    fn end(mut self) -> (MemDisks, Counters) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().expect("it ends once").join().expect("the server did not panic")
    }
}

fn serve(listener: &UnixListener, disks: Vec<MemDisk>, stop: &AtomicBool) -> (MemDisks, Counters) {
    let mut io = make_ring(Pool::new(&bed::classes()));
    let mut disks = MemDisks(disks);
    let mut server = Server::new(bed::SERVER_ID, Limits::default());
    let mut done = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        while let Ok((stream, _)) = listener.accept() {
            let sock = io.attach(stream.into()).expect("a socket for the ring");
            server.attach(&mut io, sock, &disks).expect("there is room");
        }
        server.collect(&mut io, &mut disks);
        let until = io.now() + 2_000_000;
        io.poll(Some(until), &mut done);
        for done in done.drain(..) {
            server.done(&mut io, &mut disks, done);
        }
    }
    (disks, server.counters())
}

/// With the pool registered if this user may lock that much memory.
fn make_ring(pool: Pool) -> Ring {
    Ring::new(pool.clone(), RingConfig::default())
        .or_else(|_| Ring::new(pool, RingConfig { register_pool: false, ..RingConfig::default() }))
        .expect("a ring")
}

/// True if the tool is here.
fn have(tool: &str) -> bool {
    let here = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| Path::new(&folder).join(tool).exists()));
    assert!(here || std::env::var_os("CI").is_none(), "{tool} is not installed");
    if !here {
        println!("SKIPPED: {tool} is not installed");
    }
    here
}

fn run(program: &str, args: &[&str]) -> String {
    let Output { status, stdout, stderr } = Command::new(program).args(args).output().expect("it starts");
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{program} {args:?}: {status}\n{stdout}\n{stderr}");
    stdout.into_owned()
}

#[test]
fn nbdinfo_describes_the_export() {
    if !have("nbdinfo") {
        return;
    }
    let served = Served::new(vec![MemDisk::new(1, "system", 16 << 20), MemDisk::new(2, "data", 8 << 20)]);
    let one = run("nbdinfo", &["--json", &served.uri("data")]);
    for expected in [
        "\"export-size\": 8388608",
        "\"can_multi_conn\": true",
        "\"is_read_only\": false",
        "\"block_size_minimum\": 1,",
        "\"block_size_preferred\": 4096",
        "\"block_size_maximum\": 33554432",
        "base:allocation",
        "\"can_fua\": true",
        "\"can_df\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"can_fast_zero\": true",
        "\"can_cache\": true",
    ] {
        assert!(one.contains(expected), "{expected} is missing in {one}");
    }
    let all = run("nbdinfo", &["--list", &served.uri("")]);
    assert!(all.contains("export=\"system\"") && all.contains("export=\"data\""), "{all}");
    assert!(run("nbdinfo", &["--map", &served.uri("system")]).contains("hole,zero"));
    served.end();
}

#[test]
fn nbdcopy_copies_both_ways() {
    if !have("nbdcopy") {
        return;
    }
    let served = Served::new(vec![MemDisk::new(1, "disk", 64 << 20)]);
    let mut data = bed::pattern(5, 64 << 20);
    data[10 << 20..30 << 20].fill(0);
    let (from, back) = (served.path("from"), served.path("back"));
    std::fs::write(&from, &data).expect("a file");
    run("nbdcopy", &["--flush", from.to_str().unwrap(), &served.uri("disk")]);
    run("nbdcopy", &["--connections=4", "--requests=64", &served.uri("disk"), back.to_str().unwrap()]);
    assert!(std::fs::read(back).expect("the copy") == data);
    run("nbdcopy", &["--request-size=33554432", &served.uri("disk"), served.path("again").to_str().unwrap()]);
    assert!(std::fs::read(served.path("again")).expect("the copy") == data);
    let (disks, counters) = served.end();
    assert!(disks.0[0].data == data);
    assert_eq!(counters.errors, 0);
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    if !have("qemu-img") {
        return;
    }
    let served = Served::new(vec![MemDisk::new(1, "disk", 64 << 20)]);
    let mut data = bed::pattern(6, 64 << 20);
    data[1 << 20..40 << 20].fill(0);
    let from = served.path("from");
    std::fs::write(&from, &data).expect("a file");
    let (from, uri) = (from.to_str().unwrap(), served.uri("disk"));
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", from, &uri]);
    assert!(run("qemu-img", &["compare", "-f", "raw", "-F", "raw", from, &uri]).contains("identical"));
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &uri]);
    assert!(map.contains("\"zero\": true"), "{map}");
    let info = run("qemu-img", &["info", "-f", "raw", &uri]);
    assert!(info.contains("64 MiB"), "{info}");
    let (disks, _) = served.end();
    assert!(disks.0[0].data == data);
}

#[test]
fn qemu_io_reads_what_it_wrote() {
    if !have("qemu-io") {
        return;
    }
    let served = Served::new(vec![MemDisk::new(1, "disk", 64 << 20)]);
    let script = [
        "write -P 0xab 100 70000",
        "read -P 0xab 100 70000",
        "write -z 4096 8192",
        "read -P 0 4096 8192",
        "write -f -P 0x11 1M 32M",
        "read -P 0x11 1M 32M",
        "discard 2M 1M",
        "aio_write -P 7 0 512",
        "aio_read 0 4k",
        "aio_flush",
        "flush",
        "write -z -u 8M 16M",
        "alloc 8M 1M",
    ];
    let mut args = vec!["-f", "raw"];
    for command in &script {
        args.extend(["-c", command]);
    }
    let uri = served.uri("disk");
    args.push(&uri);
    let out = run("qemu-io", &args);
    assert!(!out.contains("verification failed") && !out.contains("error"), "{out}");
    served.end();
}

#[test]
fn fio_verifies_its_writes() {
    if !have("fio") {
        return;
    }
    if !Command::new("fio").arg("--enghelp=nbd").output().is_ok_and(|o| o.status.success()) {
        println!("SKIPPED: this fio has no nbd engine");
        return;
    }
    let served = Served::new(vec![MemDisk::new(1, "disk", 64 << 20)]);
    let uri = format!("--uri={}", served.uri("disk"));
    // It leaves a file behind where it runs.
    let state = format!("--aux-path={}", served.folder.path().display());
    let common = ["--name=job", "--ioengine=nbd", "--size=16M", "--verify=crc32c", "--verify_fatal=1", "--thread"];
    for job in [["--rw=randwrite", "--bs=4k", "--iodepth=32"], ["--rw=randrw", "--bsrange=512-128k", "--iodepth=16"]] {
        run("fio", &[&common[..], &job[..], &[&uri, &state]].concat());
    }
    let (_, counters) = served.end();
    assert_eq!(counters.errors, 0);
}

#[test]
fn nbdsh_meets_every_corner() {
    if !have("nbdsh") {
        return;
    }
    let served = Served::new(vec![MemDisk::new(1, "disk", 64 << 20)]);
    let script = r#"
import nbd, errno, os
uri = os.environ["URI"]

def fails(expected, call, *args, **kw):
    try:
        call(*args, **kw)
    except nbd.Error as error:
        assert error.errnum == expected, (error.string, error.errnum, expected)
    else:
        raise AssertionError("%s succeeded" % call)

def connected(structured=True):
    h = nbd.NBD()
    h.set_handshake_flags(nbd.HANDSHAKE_FLAG_MASK)
    if not structured:
        h.set_request_structured_replies(False)
    else:
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_uri(uri)
    h.set_strict_mode(0)
    return h

for structured in (True, False):
    h = connected(structured)
    size = h.get_size()
    assert h.get_structured_replies_negotiated() == structured
    h.pwrite(b"x" * 1000, 333)
    assert h.pread(1002, 332) == b"\0" + b"x" * 1000 + b"\0"
    h.pwrite(b"y" * 4096, 0, nbd.CMD_FLAG_FUA)
    h.flush()
    big = os.urandom(32 << 20)
    h.pwrite(big, 77)
    assert h.pread(len(big), 77) == big
    h.zero(1 << 20, 10, nbd.CMD_FLAG_NO_HOLE)
    assert h.pread(1 << 20, 10) == bytes(1 << 20)
    h.trim(1 << 20, 1 << 20)
    h.cache(1 << 20, 0)
    fails(errno.EINVAL, h.pread, 512, size)
    fails(errno.ENOSPC, h.pwrite, b"z" * 512, size - 1)
    fails(errno.ENOSPC, h.zero, 512, size)
    fails(errno.EINVAL, h.trim, 512, size)
    fails(errno.EINVAL, h.pread, 512, 0, 1 << 9)
    fails(errno.EINVAL, h.pread, 0, 0)
    fails(errno.EINVAL, h.pwrite, bytes((32 << 20) + 1), 0)
    fails(errno.ENOTSUP, h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO)
    if structured:
        assert h.pread(65536, 1, nbd.CMD_FLAG_DF) == h.pread(65536, 1)
        seen = []
        h.block_status(size, 0, lambda context, offset, extents, error: seen.append((context, offset, extents)) or 0)
        assert seen and seen[0][0] == "base:allocation"
        assert sum(seen[0][2][0::2]) <= size
        one = []
        h.block_status(1 << 20, 5, lambda c, o, e, err: one.append(e) or 0, nbd.CMD_FLAG_REQ_ONE)
        assert len(one[0]) == 2 and one[0][0] <= 1 << 20
    else:
        fails(errno.EINVAL, h.pread, 512, 0, nbd.CMD_FLAG_DF)
    cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([i]) * 4096), i * 4096) for i in range(200)]
    while h.aio_in_flight() > 0:
        h.poll(-1)
    for cookie in cookies:
        assert h.aio_command_completed(cookie)
    for i in range(200):
        assert h.pread(4096, i * 4096) == bytes([i]) * 4096
    h.shutdown()

h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
names = []
h.opt_list(lambda name, description: names.append((name, description)) or 0)
assert names == [("disk", "the disk disk")], names
contexts = []
h.opt_list_meta_context(lambda name: contexts.append(name) or 0)
assert contexts == ["base:allocation"]
h.set_export_name("nothing")
fails(errno.ENOENT, h.opt_info)
h.set_export_name("disk")
h.set_full_info(True)
h.opt_info()
assert h.get_canonical_export_name() == "disk"
assert h.get_export_description() == "the disk disk"
h.opt_go()
assert h.pread(1, 0)
h.shutdown()

h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
h.opt_abort()

h = nbd.NBD()
h.set_tls(nbd.TLS_ALLOW)
h.connect_uri(uri)
assert not h.get_tls_negotiated()

# Old clients: no fixed newstyle, no structured replies.
h = nbd.NBD()
h.set_handshake_flags(0)
h.connect_uri(uri)
assert h.get_size() == size and h.pread(1, 0)
"#;
    // Its module belongs to the system's Python, which need not be the first one in the path.
    let path = "/usr/bin:/bin:/usr/local/bin";
    let nbdsh = Command::new("nbdsh").env("PATH", path).env("URI", served.uri("disk")).args(["-c", script]).output();
    let out = nbdsh.expect("it starts");
    assert!(out.status.success(), "{}\n{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    served.end();
}
