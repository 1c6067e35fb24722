#!/usr/bin/python3
"""Real faults against real processes, under load. `faults.py [ROUNDS [SEED]]`.

Each round kills a process (or several) at a random moment while clients write through QEMU's reconnecting client, starts
it again, and ends with the host quiet: every answered write is there, source and replica are the same byte for byte, and
a random older point, whose content was noted when the host was quiet, still shows that content.

Then, once each: a target that is stopped for a while, a link that is slow and then cut, a full journal disk, and a disk
that fails writes. Needs root for the full disk.
"""

import contextlib
import os
import random
import socket
import subprocess
import sys
import threading
import time

import nbd

from cluster import MIB, Cluster, Failed, Tests, connects, digest, eventually, expect, free_port, run, workspace
from continuity import Writers, protected_again, through_qemu

SIZE = 64 * MIB
POINTS = 12
# No write may take longer while the replica is slow or gone, in seconds; the machine that tests may be busy, too.
STALL = 5


class Relay:
    """Stands between source and target: passes bytes on, no faster than `rate` a second, or not at all."""

    def __init__(self, to):
        self.to = to
        self.rate = None
        self.open = True
        self.pairs = []
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
            for one, other in ((ours, theirs), (theirs, ours)):
                threading.Thread(target=self.carry, args=(one, other), daemon=True).start()

    def carry(self, one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                if self.rate:
                    time.sleep(len(data) / self.rate)
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

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


class Scene:
    """A protected pair whose stream goes through a relay, and the points whose content is known."""

    def __init__(self, folder, rng, journal=None, image=None, source_config=""):
        self.rng = rng
        self.folder = folder
        stream_port = free_port()
        self.relay = Relay(stream_port)
        self.cluster = Cluster(folder, {"data": SIZE}, stream_port=stream_port,
                               advertise=f"127.0.0.1:{self.relay.port}", journal=journal,
                               images={"data": image} if image else {}, source_config=source_config)
        self.points = []

    def close(self):
        self.cluster.close()
        self.relay.close()

    @contextlib.contextmanager
    def load(self):
        """Clients write until the end of the block; then all that was answered is read back."""
        with through_qemu(self.folder, self.cluster.uri("data")) as uri:
            writers = Writers(uri)
            bulk = threading.Event()
            errors = []
            large = threading.Thread(target=self.bulk, args=(uri, bulk, errors))
            large.start()
            try:
                writers.progress()
                yield writers
                writers.progress()
            finally:
                bulk.set()
                large.join(60)
                writers.end()
            expect(not errors, "\n".join(errors))
            writers.verify(uri)

    def bulk(self, uri, over, errors):
        """Longer writes, zeroes and discards, behind the blocks of the writers."""
        rng = random.Random(self.rng.random())
        try:
            handle = nbd.NBD()
            handle.connect_uri(uri)
            while not over.is_set():
                at, length = rng.randrange(8 * MIB, SIZE - 2 * MIB), rng.choice([4096, 65536, 300_000, MIB])
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

    def check(self):
        """The host is quiet: source and replica are the same, a random older point is what it was; notes a new one."""
        eventually("the group is protected again", lambda: protected_again(self.cluster), timeout=120)
        self.cluster.replica_is_source()
        if self.points:
            seq, wanted = self.rng.choice(self.points)
            view = self.cluster.open_view("older", f"seq:{seq}")
            try:
                expect(digest(view["data"]) == wanted, f"record {seq} no longer shows what it showed")
            finally:
                self.cluster.close_view("older")
        seq = self.cluster.settle()
        self.points = [*self.points[-POINTS:], (seq, digest(self.cluster.uri("data")))]


def killed(scene, which):
    """Processes die under load, at a random moment, and come back after a random while."""
    with scene.load() as writers:
        time.sleep(scene.rng.uniform(0.1, 1.5))
        processes = [getattr(scene.cluster, name) for name in which]
        for process in processes:
            process.kill()
        time.sleep(scene.rng.choice([0, 0, 0.3, 1.5]))
        scene.rng.shuffle(processes)
        for process in processes:
            process.start()
        writers.progress()
        time.sleep(scene.rng.uniform(0, 1))
    scene.check()


def stopped(scene, seconds):
    """A target that stands still does not hold the hosts up, and is caught up with."""
    with scene.load() as writers:
        os.kill(scene.cluster.target.process.pid, 19)  # SIGSTOP
        try:
            writers.stall()
            begun = time.monotonic()
            while time.monotonic() - begun < seconds:
                writers.progress()
                time.sleep(0.2)
            stall = writers.stall()
            expect(stall < STALL, f"a write took {stall:.1f} s while the target stood still")
        finally:
            os.kill(scene.cluster.target.process.pid, 18)  # SIGCONT
    scene.check()


def slow_then_cut(scene, seconds):
    """A link of a tenth of the load, then none, then the old one again."""
    with scene.load() as writers:
        scene.relay.rate = MIB
        try:
            time.sleep(seconds)
            writers.progress()
            scene.relay.cut()
            writers.stall()
            time.sleep(seconds)
            writers.progress()
            stall = writers.stall()
            expect(stall < STALL, f"a write took {stall:.1f} s without a link")
        finally:
            scene.relay.rate = None
            scene.relay.mend()
        writers.progress()
    scene.check()


def full_journal(scene, mount):
    """The disk of the journal is full: hosts go on, the reason is told, and with room again all is mended."""
    filler = mount / "filler"
    free = os.statvfs(mount).f_bavail * os.statvfs(mount).f_frsize
    with scene.load() as writers:
        run("fallocate", "-l", str(max(4096, free - 2 * MIB)), filler)
        try:
            writers.stall()
            for _ in range(20):
                writers.progress()
                time.sleep(0.25)
            stall = writers.stall()
            expect(stall < STALL, f"a write took {stall:.1f} s while the journal was full")
            scene.cluster.target.check()
        finally:
            filler.unlink()
    scene.check()


def failing_disk(scene, trigger):
    """The source's disk fails writes for a while: the host is told, and afterwards the replica is what the disk holds."""
    handle = nbd.NBD()
    handle.connect_uri(scene.cluster.uri("data"))
    failed = done = 0
    for turn in range(400):
        if turn == 100:
            trigger.write_text("now")
        if turn == 300:
            trigger.unlink()
        try:
            handle.pwrite(bytes([turn % 251 + 1]) * 8192, (turn * 37 % 4000) * 8192)
            done += 1
        except nbd.Error as error:
            expect(100 <= turn < 300, f"write {turn}: {error}")
            failed += 1
    handle.flush()
    handle.shutdown()
    expect(failed > 0 and done >= 200, f"{done} writes succeeded, {failed} failed")
    scene.cluster.source.check()

    def same():
        # What failed is read again within seconds; until then the replica calls it unreadable.
        try:
            return scene.cluster.replica_is_source() or True
        except Failed:
            return False
    eventually("the replica is what the disk holds", same, timeout=30, pause=1)
    scene.check()


@contextlib.contextmanager
def small_file_system(folder, size):
    """A file system of its own for a journal."""
    image, mount = folder / "small.img", folder / "small"
    mount.mkdir()
    with open(image, "wb") as file:
        file.truncate(size)
    run("mkfs.ext4", "-q", "-F", image)
    run("mount", "-o", "loop", image, mount)
    try:
        yield mount
    finally:
        eventually("the file system is free", lambda: subprocess.run(["umount", mount], check=False).returncode == 0)


@contextlib.contextmanager
def disk_that_can_fail(folder, size):
    """A file whose writes fail while another file exists."""
    backing, mount, trigger, path = folder / "backing.img", folder / "fuse", folder / "trigger", folder / "fail.sock"
    mount.mkdir()
    with open(backing, "wb") as file:
        file.truncate(size)
    server = subprocess.Popen(["nbdkit", "-f", "-U", path, "--filter=error", "file", backing, "error-pwrite=EIO",
                               "error-pwrite-rate=50%", f"error-pwrite-file={trigger}"], stderr=subprocess.DEVNULL)
    fuse = None
    try:
        eventually("nbdkit listens", lambda: connects(str(path)))
        target = mount / "disk.img"
        target.touch()
        fuse = subprocess.Popen(["nbdfuse", target, f"nbd+unix:///?socket={path}"], stderr=subprocess.DEVNULL)
        eventually("nbdfuse serves", lambda: target.stat().st_size == size)
        yield target, trigger
    finally:
        subprocess.run(["fusermount3", "-u", mount / "disk.img"], check=False)
        for process in (fuse, server):
            if process:
                process.terminate()
                process.wait(20)


@contextlib.contextmanager
def scene(*args, **options):
    made = Scene(*args, **options)
    try:
        yield made
    finally:
        made.close()


def main():
    tests = Tests()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    seconds = float(os.environ.get("FAULT_SECONDS", "30"))
    print(f"faults.py {rounds} {seed}", flush=True)
    rng = random.Random(seed)
    with workspace("faults") as folder, scene(folder, rng) as one:
        tests.run("a protected pair is what its source is", one.check)
        for turn in range(rounds):
            which = rng.choice([["source"], ["source"], ["target"], ["target"], ["coordinator"], ["source", "target"],
                                ["source", "target", "coordinator"]])
            if not tests.run(f"round {turn + 1}: {' and '.join(which)} killed", killed, one, which):
                for process in one.cluster.processes:
                    print(f"--- {process.name}\n{process.tail(40)}", flush=True)
                    if not process.alive():
                        process.start()
        tests.run(f"the target stands still for {seconds:.0f} s", stopped, one, seconds)
        tests.run("the link is slow, then cut", slow_then_cut, one, seconds / 3)
    # Without a spill the dirty map is reached at once, and a resync is what mends.
    with workspace("dirty") as folder, scene(folder, rng, source_config="spill_budget = 0") as one:
        tests.run("without a spill: the target stands still", stopped, one, 5)
        tests.run("without a spill: the link is slow, then cut", slow_then_cut, one, 5)
        tests.run("without a spill: source and target killed", killed, one, ["source", "target"])
    if os.geteuid() == 0:
        with workspace("full") as folder, small_file_system(folder, 512 * MIB) as mount:
            with scene(folder, rng, journal=mount / "journal") as one:
                tests.run("the journal's disk is full for a while", full_journal, one, mount)
    else:
        print("skip - the journal's disk is full (needs root)")
    with workspace("failing") as folder, disk_that_can_fail(folder, SIZE) as (image, trigger):
        with scene(folder, rng, image=image) as one:
            tests.run("the source's disk fails writes for a while", failing_disk, one, trigger)
    tests.end()


if __name__ == "__main__":
    main()
