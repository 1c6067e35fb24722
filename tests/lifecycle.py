#!/usr/bin/python3
"""What happens in the life of a protected group, with real processes and clients: it is seeded, its disks grow, come and
go while the others are written, its policy becomes synchronous and keeps its deadline, its source is cut off under a
lease, an older copy of its write-intent log is put back, what a source holds more than its replica is listed and
exported after a failover, and it is paused.
"""

import json
import os
import pathlib
import signal
import threading
import time

import nbd

import pauses
from cluster import MIB, Cluster, Failed, Tests, digest, eventually, expect, free_port, random_file, run, workspace
from continuity import BLOCK, BLOCKS, WRITERS, Writers, protected_again, through_qemu
from scene import Relay, connected

SIZE = 64 * MIB
EXTENT = 4 * MIB
# What may come on top of a time that was promised, seconds: the machine that tests may be busy.
SLACK = 2.0


class Pair:
    """A cluster behind relays: one on the stream, one between source and coordinator."""

    def __init__(self, folder, disks, **options):
        port = free_port()
        self.stream = Relay(port)
        self.control = None
        self.cluster = Cluster(folder, disks, stream_port=port, advertise=f"127.0.0.1:{self.stream.port}",
                               source_port=self.between, **options)

    def between(self, port):
        self.control = Relay(port)
        return self.control.port

    def close(self):
        self.cluster.close()
        self.stream.close()
        if self.control:
            self.control.close()


def seeded(folder):
    """A copy that is already at the target saves sending the disk: only what differs travels."""
    size, differs = 128 * MIB, 24
    image, seed = folder / "data.img", folder / "seed.img"
    random_file(image, size, 7)
    run("cp", "--sparse=never", image, seed)
    with open(image, "r+b") as file:
        for number in range(differs):
            file.seek((number * 5 + 1) * MIB)
            file.write(os.urandom(BLOCK))
    pair = Pair(folder, {"data": size}, images={"data": image}, options={"data": f",seed={seed}"})
    try:
        pair.cluster.settle()
        sent = pair.stream.carried
        hashes = size // BLOCK * 16
        print(f"    {sent} bytes sent for a disk of {size}: {differs * BLOCK} differ, {hashes} are hashes", flush=True)
        # What differs travels in pieces, hashes have frames around them.
        expect(differs * BLOCK < sent < 2 * hashes + differs * 65536, f"{sent} bytes were sent")
        pair.cluster.replica_is_source()
    finally:
        pair.close()


class Live:
    """One pair for what a group goes through without an end."""

    def __init__(self, folder):
        self.folder = folder
        self.pair = Pair(folder, {"data": SIZE})
        self.cluster = self.pair.cluster
        self.numbers = None

    def under_load(self, step):
        """Writers go on on disk `data`, and lose nothing: through a client that reconnects, as a group that gets or loses
        a disk is begun anew."""
        with through_qemu(self.folder, self.cluster.uri("data")) as uri:
            writers = Writers(uri, self.numbers)
            try:
                writers.progress()
                step(writers)
                writers.progress()
            finally:
                writers.end()
                self.numbers = writers.number
            writers.verify(uri)

    def grows(self):
        """A client that connects after the disk has grown sees its new size; an older point has the old one."""
        before = self.cluster.settle()
        image = self.folder / "data.img"
        self.under_load(lambda writers: os.truncate(image, SIZE + 32 * MIB))

        def size():
            handle = connected(self.cluster.uri("data"))
            try:
                return handle.get_size()
            finally:
                handle.shutdown()
        eventually("a client sees the new size", lambda: size() == SIZE + 32 * MIB)
        handle = connected(self.cluster.uri("data"))
        last = os.urandom(BLOCK)
        handle.pwrite(last, SIZE + 32 * MIB - BLOCK)
        handle.flush()
        handle.shutdown()
        eventually("the group is protected again", lambda: protected_again(self.cluster), timeout=60)
        self.cluster.replica_is_source()
        for point, expected in ((f"seq:{before}", SIZE), ("latest", SIZE + 32 * MIB)):
            view = connected(self.cluster.open_view("size", point)["data"])
            found = view.get_size()
            end = bytes(view.pread(BLOCK, found - BLOCK))
            view.shutdown()
            self.cluster.close_view("size")
            expect(found == expected, f"{point} has {found} bytes, not {expected}")
            expect((end == last) == (point == "latest"), f"{point}: another end of the disk")

    def joins(self):
        """A disk is added while another is written; afterwards both are as at the source."""
        image = self.folder / "logs.img"
        random_file(image, 32 * MIB, 3)

        def add(writers):
            writers.stall()
            self.cluster.command("disk", "add", Cluster.GROUP, "logs", "--path", image)
            self.cluster.disks["logs"] = 32 * MIB
            eventually("the new disk is protected", lambda: protected_again(self.cluster), timeout=60)
            handle = connected(self.cluster.uri("logs"))
            handle.pwrite(os.urandom(MIB), 5 * MIB)
            handle.flush()
            handle.shutdown()
            writers.progress()
            stall = writers.stall()
            expect(stall < SLACK, f"a write to the other disk took {stall:.1f} s")
        self.under_load(add)
        eventually("the group is protected again", lambda: protected_again(self.cluster), timeout=60)
        self.cluster.replica_is_source()

    def leaves(self):
        """A disk is removed while another is written; a point from before still shows both."""
        before = self.cluster.settle()
        held = {disk: digest(self.cluster.uri(disk)) for disk in ("data", "logs")}
        uri = self.cluster.uri("logs")

        def remove(writers):
            writers.stall()
            self.cluster.command("disk", "remove", Cluster.GROUP, "logs")
            del self.cluster.disks["logs"]

            def gone():
                try:
                    connected(uri).shutdown()
                    return False
                except nbd.Error:
                    return True
            eventually("the export is gone", gone)
            writers.progress()
            stall = writers.stall()
            expect(stall < SLACK, f"a write to the other disk took {stall:.1f} s")
        self.under_load(remove)
        eventually("the group is protected again", lambda: protected_again(self.cluster), timeout=60)
        self.cluster.replica_is_source()
        view = self.cluster.open_view("before", f"seq:{before}")
        try:
            expect(set(view) == {"data", "logs"}, f"record {before} shows {set(view)}")
            for disk, wanted in held.items():
                expect(digest(view[disk]) == wanted, f"disk {disk} is not what it was at record {before}")
        finally:
            self.cluster.close_view("before")

    def comes_back(self):
        """A disk that had left joins again, as a new one of the group."""
        with open(self.folder / "logs.img", "r+b") as file:
            file.seek(9 * MIB)
            file.write(os.urandom(MIB))
        self.cluster.command("disk", "add", Cluster.GROUP, "logs", "--path", self.folder / "logs.img")
        self.cluster.disks["logs"] = 32 * MIB
        eventually("both disks are protected", lambda: protected_again(self.cluster), timeout=60)
        self.cluster.replica_is_source()

    def deadline(self):
        """Synchronous: a write waits for the target, but no longer than the deadline; then it goes on, and says so."""
        self.cluster.command("policy", "update", "gold", "--sync-deadline", "2s")
        eventually("source and target go together", lambda: self.cluster.status()["synchronous"] == "together")
        target = self.cluster.target.process.pid

        def stands_still(writers):
            writers.stall()
            os.kill(target, signal.SIGSTOP)
            try:
                begun = time.monotonic()
                count = sum(writers.count)
                time.sleep(0.7)
                # A little may have been acknowledged on its way; whoever was answered without the target would be many.
                expect(sum(writers.count) - count <= 8 * WRITERS, "writes were answered while the target stood still")
                writers.progress()
                waited = time.monotonic() - begun
                stall = writers.stall()
                print(f"    the target stands still: writes go on after {waited:.2f} s, longest {stall:.2f} s", flush=True)
                expect(0.9 < stall < 2 + SLACK, f"a write took {stall:.2f} s with a deadline of 2 s")
                eventually("it says so", lambda: self.cluster.status()["synchronous"] == "apart")
                expect(not self.cluster.status()["zero_loss"], "zero loss is claimed while source and target are apart")
                writers.stall()
                writers.progress()
                expect(writers.stall() < SLACK, "each write waits for a deadline")
            finally:
                os.kill(target, signal.SIGCONT)
            eventually("they are together again", lambda: self.cluster.status()["synchronous"] == "together")
        self.under_load(stands_still)
        self.cluster.replica_is_source()

    def zero_loss(self):
        """The source is killed under load; the replica is started: no answered write is missing."""
        eventually("zero loss is claimed", lambda: self.cluster.status()["zero_loss"])
        writers = Writers(self.cluster.uri("data"), self.numbers)
        writers.progress()
        time.sleep(1)
        self.cluster.source.kill()
        writers.over.set()
        for thread in writers.threads:
            thread.join(60)
        done = self.cluster.command("failover", "start", Cluster.GROUP, "--to", "latest", "--unconfirmed", Cluster.GROUP)
        expect(done["state"] == "done", json.dumps(done, indent=1))
        replica = connected(nbd_uri(done, "data"))
        for writer in range(WRITERS):
            for block in range(BLOCKS):
                number = writers.answered[writer][block]
                seen = bytes(replica.pread(BLOCK, Writers.place(writer, block)))
                # The last one of each may be there, answered or not.
                last = writers.number[writer]
                allowed = {number} | ({last} if last * 7 % BLOCKS == block else set())
                expect(not number or any(seen == Writers.content(writer, block, n) for n in allowed),
                       f"writer {writer}, block {block}: write {number} was answered, `{seen[:24]}` is there")
        replica.shutdown()
        print(f"    {sum(writers.count)} answered writes are all there", flush=True)


def nbd_uri(done, disk):
    """Where a failover offers a disk."""
    exports = done["result"]["view"]["exports"]
    return next(uri for export in exports if export["disk"] == disk for uri in export["uris"] if uri.startswith("nbd+unix"))


class Answers(threading.Thread):
    """A host that writes and reads; when it was answered last."""

    def __init__(self, uri):
        super().__init__(daemon=True)
        self.handle = connected(uri)
        self.last = {"write": 0.0, "read": 0.0}
        self.count = 0
        self.error = None
        self.start()

    def run(self):
        reader = threading.Thread(target=self.read, daemon=True)
        try:
            self.reads = connected(self.handle.get_uri())
            reader.start()
            while True:
                self.count += 1
                self.handle.pwrite(self.count.to_bytes(8, "little") * 512, self.count % 1024 * BLOCK)
                self.last["write"] = time.monotonic()
        except nbd.Error as error:
            self.error = error

    def read(self):
        try:
            while True:
                self.reads.pread(BLOCK, 0)
                self.last["read"] = time.monotonic()
        except nbd.Error:
            pass


def lease(folder):
    """A source that hears from nobody holds its I/O before the failover goes on without a confirmation."""
    pair = Pair(folder, {"data": SIZE})
    cluster = pair.cluster
    try:
        cluster.command("policy", "update", "gold", "--lease", "3s")
        eventually("the source keeps to the lease", lambda: cluster.status()["lease_ms"] == 3000)
        host = Answers(cluster.uri("data"))
        eventually("the host is answered", lambda: host.count > 100 and host.last["read"])
        time.sleep(4)
        expect(time.monotonic() - host.last["write"] < SLACK, "a source that hears from its target holds I/O")
        pair.stream.cut()
        pair.control.cut()
        cut = time.monotonic()
        done = cluster.command("failover", "start", Cluster.GROUP, "--to", "latest")
        over = time.monotonic()
        last = dict(host.last)
        expect(done["state"] == "done", json.dumps(done, indent=1))
        expect(done["result"]["fence"] == "self-fenced", f"fence: {done['result']['fence']}")
        print(f"    cut off; the last answer came after {max(last.values()) - cut:.2f} s, the replica was started after "
              f"{over - cut:.2f} s", flush=True)
        expect(max(last.values()) < over, "the source answered after the replica was started")
        expect(max(last.values()) - cut < 3 + 1, "the source answered for longer than its lease")
        # Nor does it answer later: not alone, not when it hears of the failover.
        time.sleep(2)
        expect(host.last == last, "the source answered after its lease had ended")
        pair.stream.mend()
        pair.control.mend()
        time.sleep(3)
        expect(host.last == last, "the source answered after it had heard of the failover")
        view = connected(nbd_uri(done, "data"))
        view.pwrite(bytes(BLOCK), 0)
        view.shutdown()
        # A source that is started again stays down, too.
        cluster.source.kill()
        cluster.source.start()
        time.sleep(2)

        def answers():
            handle = nbd.NBD()
            try:
                handle.connect_uri(f"nbd+unix:///{Cluster.GROUP}/data?socket={cluster.source_socket}")
            except nbd.Error:
                return False
            cookie = handle.aio_pread(nbd.Buffer(BLOCK), 0)
            handle.poll(1000)
            return handle.aio_command_completed(cookie)
        expect(not answers(), "a source that has lost its disks answers after a restart")
    finally:
        pair.close()


def branch(folder):
    """After an unconfirmed failover the source, alive, steps down; what it holds more is listed and exported."""
    pair = Pair(folder, {"data": SIZE})
    cluster = pair.cluster
    try:
        handle = connected(cluster.uri("data"))
        handle.pwrite(os.urandom(MIB), 0)
        handle.flush()
        cluster.settle()
        pair.stream.cut()
        # Answered, and never at the target.
        lost = {at: os.urandom(65536) for at in (9 * MIB, 30 * MIB + 65536)}
        for at, data in lost.items():
            handle.pwrite(data, at)
        handle.flush()
        done = cluster.command("failover", "start", Cluster.GROUP, "--to", "latest", "--unconfirmed", Cluster.GROUP)
        expect(done["state"] == "done", json.dumps(done, indent=1))
        view = connected(nbd_uri(done, "data"))
        for at, data in lost.items():
            expect(bytes(view.pread(len(data), at)) != data, "the replica has what the link never carried")
        view.shutdown()
        # The source is still there and has stepped down.
        cookie = handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(BLOCK)), 40 * MIB)
        time.sleep(2)
        handle.poll(0)
        expect(not handle.aio_command_completed(cookie), "a source that was fenced answers a write")
        found = cluster.command("group", "branch", Cluster.GROUP)
        [disk] = found["disks"]
        ranges = disk["ranges"]
        covered = sum(length for _, length in ranges)
        print(f"    the branch: {ranges}, fenced {disk['fenced']}", flush=True)
        for at, data in lost.items():
            expect(any(begin <= at and at + len(data) <= begin + length for begin, length in ranges), f"{at} is not in {ranges}")
        expect(covered < SIZE / 2, f"{covered} bytes of {SIZE} are said to differ")
        out = folder / "branch"
        [disk] = cluster.command("group", "branch", Cluster.GROUP, "--export", out)["disks"]
        image = pathlib.Path(disk["file"])
        expect(image.parent == out and (out / "branch.json").exists(), f"written: {image}, and {list(out.iterdir())}")
        expect(image.stat().st_size == SIZE, f"the image has {image.stat().st_size} bytes")
        with open(image, "rb") as exported, open(folder / "data.img", "rb") as disk_file:
            for begin, length in ranges:
                exported.seek(begin)
                disk_file.seek(begin)
                expect(exported.read(length) == disk_file.read(length), f"{begin}: the export is not what the disk holds")
            for at, data in lost.items():
                exported.seek(at)
                expect(exported.read(len(data)) == data, f"{at}: an answered write is not in the export")
        # As sparse as what it shows.
        expect(image.stat().st_blocks * 512 <= covered + MIB, f"the image takes {image.stat().st_blocks * 512} bytes")
    finally:
        pair.close()


def older_log(folder):
    """An older copy of the write-intent log is put in its place while the source is dead: found out, and mended."""
    pair = Pair(folder, {"data": SIZE})
    cluster = pair.cluster
    try:
        cluster.settle()
        [log] = (folder / "source-state" / "intent").glob("*.intent")
        # The bits of the first synchronisation are cleared within seconds.
        time.sleep(4)
        old = log.read_bytes()
        pair.stream.cut()
        handle = connected(cluster.uri("data"))
        for extent in (3, 9):
            handle.pwrite(os.urandom(65536), extent * EXTENT)
        handle.flush()
        cluster.source.kill()
        expect(log.read_bytes() != old, "nothing was marked")
        with open(log, "r+b") as file:
            file.write(old)
        pair.stream.mend()
        cluster.source.start()
        eventually("the group is protected again", lambda: protected_again(cluster), timeout=60)
        cluster.replica_is_source()
    finally:
        pair.close()


def main():
    tests = Tests()
    with workspace("seeds") as folder:
        tests.run("a seed saves sending the disk", seeded, folder)
    with workspace("live") as folder:
        live = None

        def begin():
            nonlocal live
            live = Live(folder)
        try:
            if tests.run("a pair is protected", begin):
                for name, step in (
                    ("a disk grows while it is written", live.grows),
                    ("a disk joins while another is written", live.joins),
                    ("a disk leaves while another is written", live.leaves),
                    ("a disk that left comes back", live.comes_back),
                    ("a synchronous group keeps its deadline", live.deadline),
                    ("a synchronous group loses nothing", live.zero_loss),
                ):
                    if not tests.run(name, step):
                        for process in live.cluster.processes:
                            print(f"--- {process.name}\n{process.tail(40)}", flush=True)
        finally:
            if live:
                live.pair.close()
    with workspace("lease") as folder:
        tests.run("a source cut off holds I/O before its replica is started", lease, folder)
    with workspace("log") as folder:
        tests.run("an older copy of a write-intent log is found out", older_log, folder)
    with workspace("branch") as folder:
        tests.run("what a source holds more is listed and exported", branch, folder)
    for name, about, step in (
        ("paused", "hosts of a paused group go on, and nothing is sent", pauses.goes_on),
        ("paused-restarts", "a pause outlives source, target and coordinator", pauses.outlives),
        ("paused-failover", "a paused group fails over to what its target holds", pauses.failed_over),
    ):
        with workspace(name) as folder:
            tests.run(about, step, folder)
    tests.end()


if __name__ == "__main__":
    main()
