#!/usr/bin/python3
"""Clients that reconnect ride through every end of the source proxy: killed, stopped, replaced by a new process. No
request of theirs fails, no write that was answered is lost or undone, and the replica is what the source's disk holds.

Needs nbdkit with its retry filter, qemu-storage-daemon (qemu-system-common), python3-libnbd.
"""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import nbd

from cluster import AFTERIMAGE, MIB, Cluster, Failed, Process, Tests, connects, eventually, expect, free_port, run, workspace

SIZE = 64 * MIB
BLOCK = 4096
WRITERS = 4
# Each writer has blocks of its own: what it was answered last is what must be there.
BLOCKS = 256


class Writers:
    """Threads that write numbered blocks through a client and remember what was answered, and how long it took."""

    def __init__(self, uri, begin=None, pause=0.0):
        """Each writer goes on counting behind what `begin` says, and rests for `pause` seconds after each write."""
        self.uri = uri
        self.pause = pause
        self.over = threading.Event()
        self.number = list(begin or [0] * WRITERS)
        self.answered = [[0] * BLOCKS for _ in range(WRITERS)]
        self.count = [0] * WRITERS
        self.slowest = [0.0] * WRITERS
        self.errors = []
        self.threads = [threading.Thread(target=self.write, args=(n,)) for n in range(WRITERS)]
        for thread in self.threads:
            thread.start()

    @staticmethod
    def place(writer, block):
        return (writer * BLOCKS + block) * BLOCK

    @staticmethod
    def content(writer, block, number):
        line = f"{writer:4} {block:6} {number:11} ".encode()
        return (line * (BLOCK // len(line) + 1))[:BLOCK]

    def write(self, writer):
        try:
            handle = nbd.NBD()
            handle.connect_uri(self.uri)
            number = self.number[writer]
            while not self.over.is_set():
                number += 1
                self.number[writer] = number
                block = number * 7 % BLOCKS
                begun = time.monotonic()
                handle.pwrite(self.content(writer, block, number), self.place(writer, block),
                              nbd.CMD_FLAG_FUA if number % 16 == 0 else 0)
                self.answered[writer][block] = number
                if number % 32 == 0:
                    handle.flush()
                if number % 8 == 0:
                    seen = handle.pread(BLOCK, self.place(writer, block))
                    expect(seen == self.content(writer, block, number), f"block {block}: an answered write is not read back")
                self.slowest[writer] = max(self.slowest[writer], time.monotonic() - begun)
                self.count[writer] += 1
                if self.pause:
                    time.sleep(self.pause)
            handle.shutdown()
        except Exception as error:  # noqa: BLE001: whatever a client sees is a failure
            self.errors.append(f"writer {writer}, write {number}: {error}")

    def progress(self):
        """Waits until every writer has gone on."""
        before = list(self.count)
        eventually("every writer goes on", lambda: self.errors or all(a > b for a, b in zip(self.count, before)), 60)
        expect(not self.errors, "\n".join(self.errors))

    def stall(self):
        """The longest time that a write took since the last call, in seconds."""
        longest = max(self.slowest)
        self.slowest = [0.0] * WRITERS
        return longest

    def end(self):
        self.over.set()
        for thread in self.threads:
            thread.join(60)
        expect(not self.errors, "\n".join(self.errors))

    def verify(self, uri):
        """What was answered last is there, or a later write that was under way at the end."""
        handle = nbd.NBD()
        handle.connect_uri(uri)
        for writer in range(WRITERS):
            for block in range(BLOCKS):
                number = self.answered[writer][block]
                if number:
                    seen = handle.pread(BLOCK, self.place(writer, block))
                    expect(seen == self.content(writer, block, number),
                           f"writer {writer}, block {block}: write {number} was answered, and `{bytes(seen[:24])}` is there")
        handle.shutdown()


@contextlib.contextmanager
def through_nbdkit(folder, source):
    """nbdkit's retry filter over its client: it connects anew whenever the connection ends."""
    socket = folder / "nbdkit.sock"
    with open(folder / "nbdkit.log", "ab") as log:
        client = subprocess.Popen(["nbdkit", "-f", "-U", socket, "--filter=retry", "nbd", f"uri={source}", "retry-delay=1",
                                   "retries=60", "retry-exponential=no"], stdout=log, stderr=log)
    try:
        eventually("nbdkit listens", lambda: connects(str(socket)))
        yield f"nbd+unix:///?socket={socket}"
    finally:
        client.terminate()
        client.wait(20)
        socket.unlink(missing_ok=True)


@contextlib.contextmanager
def through_qemu(folder, source, patience=60):
    """QEMU's client with `reconnect-delay`, as a machine has it; its own export stands for the machine."""
    socket = folder / "qemu.sock"
    path, name = source.split("socket=")[1], source.split(":///")[1].split("?")[0]
    with open(folder / "qemu.log", "ab") as log:
        client = subprocess.Popen([
            "qemu-storage-daemon",
            "--blockdev", "driver=nbd,node-name=disk,server.type=unix,"
            f"server.path={path},export={name},reconnect-delay={patience}",
            "--nbd-server", f"addr.type=unix,addr.path={socket}",
            "--export", "type=nbd,id=out,node-name=disk,name=out,writable=on"], stdout=log, stderr=log)
    try:
        eventually("qemu-storage-daemon listens", lambda: client.poll() is not None or connects(str(socket)))
        expect(client.poll() is None, (folder / "qemu.log").read_text(errors="replace"))
        yield f"nbd+unix:///out?socket={socket}"
    finally:
        client.terminate()
        client.wait(20)
        socket.unlink(missing_ok=True)


CLIENTS = {"nbdkit": through_nbdkit, "QEMU": through_qemu}
# A client that was turned away tries again a second later: that is added to what the proxy itself takes.
STALL = 3.5


# What a new process may take to answer in the place of the old one, from the first sign of its end, seconds.
TAKE_OVER = 2.0


def ends(source, how):
    if how == "killed":
        source.kill()
    else:
        code = source.stop()
        expect(code == 0, f"exit code {code}:\n{source.tail()}")


def always_quick(taken):
    expect(max(taken) < TAKE_OVER, f"a new process took {max(taken):.2f} s to answer")


def answers(uri):
    """A new client reads something."""
    handle = nbd.NBD()
    try:
        handle.connect_uri(uri)
        handle.pread(BLOCK, 0)
        handle.shutdown()
        return True
    except nbd.Error:
        return False


def rides_through(cluster, folder, client, how, rounds):
    uri = cluster.uri("data")
    with client(folder, uri) as through:
        writers = Writers(through)
        try:
            writers.progress()
            taken = []
            for _ in range(rounds):
                time.sleep(1)
                writers.stall()
                begun = time.monotonic()
                ends(cluster.source, how)
                cluster.source.start()
                eventually("the new process answers", lambda: answers(uri), pause=0.01)
                taken.append(time.monotonic() - begun)
                writers.progress()
                stall = writers.stall()
                expect(stall < STALL, f"a write took {stall:.1f} s")
                print(f"    {how}: answers after {taken[-1]:.2f} s, longest write {stall:.2f} s", flush=True)
            always_quick(taken)
        finally:
            writers.end()
        writers.verify(through)
    eventually("the group is protected again", lambda: protected_again(cluster), timeout=60)
    writers.verify(cluster.uri("data"))
    cluster.replica_is_source()


def alone(cluster, folder, client, how):
    """The source ends and comes back while target and coordinator are gone: nothing of it waits for them."""
    uri = cluster.uri("data")
    with client(folder, uri) as through:
        writers = Writers(through)
        try:
            writers.progress()
            cluster.coordinator.kill()
            cluster.target.kill()
            time.sleep(1)
            writers.progress()
            writers.stall()
            ends(cluster.source, how)
            cluster.source.start()
            writers.progress()
            stall = writers.stall()
            print(f"    {how}, alone: longest write {stall:.2f} s", flush=True)
            cluster.target.start()
            time.sleep(1)
            cluster.coordinator.start()
            writers.progress()
        finally:
            writers.end()
        expect(stall < STALL, f"a write took {stall:.1f} s")
        writers.verify(through)
    eventually("the group is protected again", lambda: protected_again(cluster), timeout=60)
    cluster.replica_is_source()


# What a server of NBD says first.
GREETING = b"NBDMAGICIHAVEOPT"


class Manager:
    """Holds listening sockets, as systemd does, for processes that come and go."""

    def __init__(self, path, names=("source.nbd", "source.nbd")):
        self.names = names
        path.unlink(missing_ok=True)
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(str(path))
        tcp = socket.socket(socket.AF_INET)
        tcp.bind(("127.0.0.1", 0))
        self.addresses = [str(path), tcp.getsockname()]
        self.sockets = [unix, tcp]
        # Away from the numbers at which they are passed on.
        self.passed = []
        for held in self.sockets:
            held.listen(64)
            self.passed.append(fcntl.fcntl(held.fileno(), fcntl.F_DUPFD, 100))
            os.set_inheritable(self.passed[-1], True)

    def prefix(self):
        """What stands before a command that gets the sockets."""
        passing = " ".join(f"{3 + n}<&{number}" for n, number in enumerate(self.passed))
        return ["bash", "-c", f"export LISTEN_PID=$$ LISTEN_FDS={len(self.passed)} LISTEN_FDNAMES={':'.join(self.names)}; "
                f'exec "$@" {passing}', "bash"]

    def close(self):
        for held in self.sockets:
            held.close()
        for number in self.passed:
            os.close(number)

    def clients(self):
        """A client at each socket, which must not be turned away."""
        clients = []
        for kind, address in zip((socket.AF_UNIX, socket.AF_INET), self.addresses):
            client = socket.socket(kind)
            client.settimeout(20)
            client.connect(address)
            clients.append(client)
        return clients


def held_sockets(cluster, folder, how, rounds):
    """Clients that come while no process is there are served by the next one."""
    source = cluster.source
    usual = source.args
    source.stop()
    manager = Manager(cluster.source_socket)
    try:
        source.args = manager.prefix() + usual + ["--nbd", f"tcp:127.0.0.1:{manager.addresses[1][1]}"]
        source.pass_fds = manager.passed
        source.start()
        uri = cluster.uri("data")
        with through_qemu(folder, uri) as through:
            writers = Writers(through)
            try:
                writers.progress()
                taken = []
                for _ in range(rounds):
                    writers.stall()
                    begun = time.monotonic()
                    ends(source, how)
                    waiting = manager.clients()
                    source.start()
                    for client in waiting:
                        greeting = client.recv(len(GREETING), socket.MSG_WAITALL)
                        expect(greeting == GREETING, f"a client that waited got {greeting}")
                        client.close()
                    taken.append(time.monotonic() - begun)
                    writers.progress()
                    print(f"    {how}: who waited is answered after {taken[-1]:.2f} s, longest write {writers.stall():.2f} s",
                          flush=True)
                always_quick(taken)
            finally:
                writers.end()
            writers.verify(through)
        eventually("the group is protected again", lambda: protected_again(cluster), timeout=60)
        cluster.replica_is_source()
    finally:
        source.stop()
        expect(cluster.source_socket.exists(), "the manager's socket has been removed")
        cluster.source_socket.unlink()
        manager.close()
        source.args = usual
        source.pass_fds = ()
        source.start()


def misfits(folder):
    """Sockets that the configuration has no use for are refused, by name and address."""
    disk = folder / "misfit.img"
    with open(disk, "wb") as out:
        out.truncate(MIB)
    manager = Manager(folder / "held.sock", names=("a", "target.views"))
    try:
        def refused(*listen):
            done = subprocess.run([*manager.prefix(), AFTERIMAGE, "proxy", "--name", "x", "--serve", f"misfit={disk}", *listen],
                                  pass_fds=manager.passed, capture_output=True, text=True, timeout=60)
            expect(done.returncode == 2, f"exit code {done.returncode}: {done.stderr}")
            return done.stderr
        unix, (host, port) = manager.addresses
        said = refused("--nbd", f"unix:{folder}/other.sock")
        expect(f"`a` of the service manager listens on unix:{unix}" in said, said)
        # Its address fits, its name is for another field.
        said = refused("--nbd", f"unix:{unix}", "--nbd", f"tcp:{host}:{port}")
        expect("`target.views`" in said and f"tcp:{host}:{port}" in said, said)
    finally:
        manager.close()


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def interrupted_bench(folder, number):
    """A measurement that is interrupted leaves no process and no file."""
    place = folder / "bench"
    place.mkdir(exist_ok=True)
    bench = subprocess.Popen([AFTERIMAGE, "bench", "outage", "--pairs", "1", "--seconds", "30", "--disk-mib", "16", "--dir",
                              place], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        # Target, source, fio.
        eventually("the measurement is under way", lambda: bench.poll() is not None or len(children(bench.pid)) == 3, 60)
        expect(bench.poll() is None, "the measurement has ended")
        begun = children(bench.pid)
        bench.send_signal(number)
        said = bench.communicate(timeout=60)[1]
        expect(bench.returncode == 130 and "interrupted" in said, f"exit code {bench.returncode}: {said}")
        left = [child for child in begun if os.path.exists(f"/proc/{child}")]
        expect(not left, f"processes are left: {left}")
        expect(not list(place.iterdir()), "files are left")
    finally:
        if bench.poll() is None:
            bench.kill()
            bench.wait()


def protected_again(cluster):
    try:
        return cluster.protected()
    except (Failed, TypeError, KeyError):
        return None


def main():
    tests = Tests()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with workspace("continuity") as folder:
        cluster = None

        def begin():
            nonlocal cluster
            cluster = Cluster(folder, {"data": SIZE})
        try:
            if tests.run("a protected pair starts", begin):
                for name, client in CLIENTS.items():
                    for how in ("stopped", "killed"):
                        tests.run(f"{name} rides through a source that is {how}", rides_through, cluster, folder, client,
                                  how, rounds)
                for how in ("stopped", "killed"):
                    tests.run(f"a source that is {how} comes back with nobody else there", alone, cluster, folder,
                              through_qemu, how)
                for how in ("stopped", "killed"):
                    tests.run(f"clients wait at sockets that a manager holds while a source is {how} and replaced",
                              held_sockets, cluster, folder, how, rounds)
        finally:
            if cluster:
                cluster.close()
        tests.run("sockets that do not fit the configuration are refused", misfits, folder)
        for number in (signal.SIGINT, signal.SIGTERM):
            tests.run(f"a measurement that gets {number.name} leaves nothing behind", interrupted_bench, folder, number)
    tests.end()


if __name__ == "__main__":
    main()
