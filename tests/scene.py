"""A protected pair under load, for the tests that do harm to it: what writes, what stands between the two ends, and what
must hold once the host is quiet again.
"""

import contextlib
import pathlib
import random
import signal
import socket
import subprocess
import threading
import time

import nbd

from cluster import MIB, Cluster, Failed, connects, digest, eventually, expect, free_port, run
from continuity import BLOCK, BLOCKS, WRITERS, Writers, protected_again, through_qemu

SIZE = 64 * MIB
# Places of their own for the writers of `continuity`, for long writes, and for fio.
LONG = (8 * MIB, 36 * MIB)
FIO = (40 * MIB, 20 * MIB)
POINTS = 12
# No write may take longer while the replica is slow or gone, in seconds; the machine that tests may be busy, too.
STALL = 5


def connected(uri):
    """A client of libnbd's."""
    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


class Relay:
    """Stands between source and target: passes bytes on, no faster than `rate` a second, or not at all."""

    def __init__(self, to):
        self.to = to
        self.rate = None
        # Of all connections together, towards `to`.
        self.shared = None
        self.turn = threading.Lock()
        self.open = True
        self.pairs = []
        # Bytes passed on towards `to`.
        self.carried = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                ours, _ = self.listener.accept()
            except OSError:
                return
            if not self.open:
                ours.close()
                continue
            try:
                theirs = socket.create_connection(("127.0.0.1", self.to), timeout=5)
                theirs.settimeout(None)
            except OSError:
                ours.close()
                continue
            self.pairs.append((ours, theirs))
            for ends in ((ours, theirs, True), (theirs, ours, False)):
                threading.Thread(target=self.carry, args=ends, daemon=True).start()

    def carry(self, one, other, counted):
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                if self.rate:
                    time.sleep(len(data) / self.rate)
                if counted and self.shared:
                    with self.turn:
                        time.sleep(len(data) / self.shared if self.shared else 0)
                other.sendall(data)
                if counted:
                    self.carried += len(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def share(self, rate):
        """All connections together carry so much a second towards `to`; None: as fast as they can."""
        self.shared = rate

    def cut(self):
        """Ends all connections; new ones are refused until `mend`."""
        self.open = False
        for pair in self.pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self.pairs.clear()

    def mend(self):
        self.open = True

    def close(self):
        self.cut()
        self.listener.close()


class Fio:
    """fio writes at random and verifies what it reads back, until it is ended."""

    #: Runs that verified something, and those that were ended before they had begun: on a busy machine fio starts slowly.
    verified, early = 0, 0

    def __init__(self, folder, uri, rate):
        self.log = folder / "fio.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                ["fio", "--name=verified", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k", "--iodepth=8",
                 f"--offset={FIO[0]}", f"--size={FIO[1]}", "--verify=crc32c", "--do_verify=1", "--verify_backlog=64",
                 "--verify_fatal=1", "--randrepeat=0", "--time_based", "--runtime=3600", f"--rate_iops={rate}"],
                stdout=log, stderr=log, cwd=folder)

    def end(self):
        expect(self.process.poll() is None, "fio has ended:\n" + self.said())
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise Failed("fio did not end:\n" + self.said()) from None
        said = self.said()
        if self.process.returncode == -signal.SIGINT or (self.process.returncode == 128 and "err=" not in said):
            Fio.early += 1
            return
        Fio.verified += 1
        # fio ends with 128 when it is interrupted; what it found stands in its own words.
        expect("verify:" not in said and "err= 0" in said, f"fio, exit code {self.process.returncode}:\n{said}")

    def said(self):
        return self.log.read_text(errors="replace")[-4000:]


class Scene:
    """A protected pair whose stream goes through a relay, and the points whose content is known."""

    #: Points in the middle of a load that were looked at, and those that were none (no such record, or inside a resync).
    looked, none = 0, 0

    def __init__(self, folder, rng, journal=None, image=None, source_config=""):
        self.rng = rng
        self.folder = folder
        stream_port = free_port()
        self.relay = Relay(stream_port)
        self.cluster = Cluster(folder, {"data": SIZE}, stream_port=stream_port,
                               advertise=f"127.0.0.1:{self.relay.port}", journal=journal,
                               images={"data": image} if image else {}, source_config=source_config)
        self.points = []
        # The writers go on counting where those of the round before have ended.
        self.numbers = [0] * WRITERS

    def close(self):
        self.cluster.close()
        self.relay.close()

    @contextlib.contextmanager
    def load(self, gentle=False):
        """Clients write until the end of the block; then all that was answered is read back. A gentle load has no long
        writes, and pauses."""
        with through_qemu(self.folder, self.cluster.uri("data")) as uri:
            writers = Writers(uri, self.numbers, 0.02 if gentle else 0.0)
            over = threading.Event()
            errors = []
            large = threading.Thread(target=self.write_long, args=(uri, over, errors))
            if not gentle:
                large.start()
            fio = Fio(self.folder, uri, 50 if gentle else 400)
            try:
                writers.progress()
                yield writers
                writers.progress()
            finally:
                over.set()
                if large.ident:
                    large.join(60)
                try:
                    fio.end()
                finally:
                    writers.end()
                    self.numbers = writers.number
            expect(not errors, "\n".join(errors))
            writers.verify(uri)

    def write_long(self, uri, over, errors):
        """Longer writes, zeroes and discards."""
        rng = random.Random(self.rng.random())
        try:
            handle = nbd.NBD()
            handle.connect_uri(uri)
            while not over.is_set():
                length = rng.choice([4096, 65536, 300_000, MIB])
                at = rng.randrange(LONG[0], LONG[1] - length)
                at -= at % 512
                length -= length % 512
                kind = rng.randrange(8)
                if kind == 0:
                    handle.zero(length, at)
                elif kind == 1 and handle.can_trim():
                    handle.trim(length, at)
                else:
                    handle.pwrite(rng.randbytes(512) * (length // 512), at)
                if rng.randrange(16) == 0:
                    handle.flush()
                time.sleep(0.002)
            handle.shutdown()
        except Exception as error:  # noqa: BLE001
            errors.append(f"long writes: {error}")

    def captured_per_second(self):
        """What the load amounts to, bytes, as the source reports it."""
        return eventually("the source reports what it captures", lambda: self.cluster.status()["captured_bytes_per_s"])

    def check(self):
        """The host is quiet: source and replica are the same, a random older point is what it was, one in the middle of
        the load has what each writer had written until some moment; notes a new one."""
        eventually("the group is protected again", lambda: protected_again(self.cluster), timeout=120)
        self.cluster.replica_is_source()
        status = self.cluster.status()
        if any(condition["kind"] == "shortened" for condition in status["conditions"]):
            # A full disk gives up the oldest points, and says so.
            oldest = status["points"]["oldest"]["seq"]
            self.points = [point for point in self.points if point[0] >= oldest]
        if self.points:
            seq, wanted = self.rng.choice(self.points)
            view = self.cluster.open_view("older", f"seq:{seq}")
            try:
                expect(digest(view["data"]) == wanted, f"record {seq} no longer shows what it showed")
            finally:
                self.cluster.close_view("older")
        seq = self.cluster.settle()
        if self.points:
            self.check_between(self.points[-1][0], seq)
        self.points = [*self.points[-POINTS:], (seq, digest(self.cluster.uri("data")))]

    def check_between(self, after, until):
        """A record anywhere in between: none of a writer's writes is missing before its newest one there."""
        if until - after < 2:
            return
        seq = self.rng.randrange(after + 1, until)
        try:
            view = self.cluster.open_view("between", f"seq:{seq}")
        except Failed:
            # A number that no record has, or one of a resync: there is no such restore point.
            Scene.none += 1
            return
        try:
            Scene.looked += 1
            handle = nbd.NBD()
            handle.connect_uri(view["data"])
            for writer in range(WRITERS):
                seen = [self.number_in(handle.pread(BLOCK, Writers.place(writer, block)), writer, block)
                        for block in range(BLOCKS)]
                newest = max(seen)
                for number in range(max(1, newest - BLOCKS + 1), newest + 1):
                    block = number * 7 % BLOCKS
                    expect(seen[block] == number, f"record {seq}: writer {writer} had come to {newest}, and in block "
                           f"{block} stands {seen[block]} instead of {number}")
            handle.shutdown()
        finally:
            self.cluster.close_view("between")

    @staticmethod
    def number_in(content, writer, block):
        """Which write of that writer a block shows, whole; 0 if it was never written."""
        if not any(content):
            return 0
        fields = bytes(content[:24]).split()
        number = int(fields[2]) if len(fields) == 3 and fields[2].isdigit() else -1
        expect(bytes(content) == Writers.content(writer, block, number),
               f"writer {writer}, block {block}: `{bytes(content[:48])}` is no write of it")
        return number


@contextlib.contextmanager
def scene(*args, **options):
    made = Scene(*args, **options)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def file_system(folder, name, size, image=None):
    """A small file system of its own, mounted."""
    mount = folder / name
    mount.mkdir()
    if image is None:
        image = folder / f"{name}.img"
        with open(image, "wb") as file:
            file.truncate(size)
        run("mkfs.ext4", "-q", "-F", image)
    run("mount", "-o", "loop", image, mount)
    try:
        yield mount
    finally:
        eventually("the file system is free", lambda: subprocess.run(["umount", mount], check=False).returncode == 0)


@contextlib.contextmanager
def filtered_file(folder, name, backing, *filters):
    """A file as nbdkit's filters show it, in a folder of its own."""
    mount, path = folder / f"{name}-fuse", folder / f"{name}.sock"
    mount.mkdir()
    size = pathlib.Path(backing).stat().st_size
    options = [part for part in filters if part.startswith("--")]
    settings = [part for part in filters if not part.startswith("--")]
    server = subprocess.Popen(["nbdkit", "-f", "-U", path, *options, "file", backing, *settings], stderr=subprocess.DEVNULL)
    fuse = None
    target = mount / "disk.img"
    try:
        eventually("nbdkit listens", lambda: connects(str(path)))
        target.touch()
        fuse = subprocess.Popen(["nbdfuse", "-C", "4", target, f"nbd+unix:///?socket={path}"], stderr=subprocess.DEVNULL)
        eventually("nbdfuse serves", lambda: target.stat().st_size == size)
        yield target
    finally:
        subprocess.run(["fusermount3", "-u", target], check=False)
        for process in (fuse, server):
            if process:
                process.terminate()
                process.wait(20)
