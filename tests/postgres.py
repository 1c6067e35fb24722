#!/usr/bin/python3
"""PostgreSQL on a protected disk loses its source in the middle of pgbench, and recovers from the replica.

A real block device (nbdfuse and a loop device over the protected export) carries ext4 and PostgreSQL. A witness outside
commits rows and notes when each commit was confirmed. The source proxy is killed; the group fails over; PostgreSQL
recovers on the view. Every row whose commit was confirmed longer before the kill than the RPO shown last must be there,
with no gap, and the books of pgbench must balance.

Needs root, /dev/fuse and loop devices; nbdfuse (libnbd-bin), fuse3, e2fsprogs, postgresql-15.
"""

import json
import os
import pathlib
import pwd
import shutil
import subprocess
import sys
import threading
import time

from cluster import MIB, Cluster, Failed, Tests, eventually, expect, run, workspace

BIN = pathlib.Path("/usr/lib/postgresql/15/bin")
SIZE = 768 * MIB
#: How long pgbench and the witness work before the source is killed, seconds.
WORK = 10.0


class Device:
    """An export as a block device of this host, mounted."""

    def __init__(self, folder, name, uri):
        self.mount = folder / f"{name}-mount"
        self.fuse = folder / f"{name}-fuse"
        self.loop = None
        self.mounted = False
        self.mount.mkdir()
        self.fuse.mkdir()
        self.file = self.fuse / "disk"
        self.log = open(folder / f"{name}-nbdfuse.log", "ab")
        self.process = subprocess.Popen(["nbdfuse", "-C", "4", str(self.file), uri], stdout=self.log, stderr=self.log)
        eventually("nbdfuse shows the disk", lambda: self.process.poll() is not None or self.file.exists())
        expect(self.process.poll() is None, "nbdfuse has ended")
        self.loop = run("losetup", "--find", "--show", "--direct-io=on", self.file).decode().strip()

    def attach(self):
        run("mount", self.loop, self.mount)
        self.mounted = True

    def detach(self):
        """In whatever state it is."""
        if self.mounted:
            if subprocess.run(["umount", self.mount], capture_output=True, check=False, timeout=60).returncode != 0:
                subprocess.run(["umount", "--lazy", self.mount], capture_output=True, check=False)
            self.mounted = False

    def close(self):
        self.detach()
        if self.loop:
            subprocess.run(["losetup", "--detach", self.loop], capture_output=True, check=False)
            self.loop = None
        subprocess.run(["fusermount3", "-u", "-z", self.fuse], capture_output=True, check=False)
        # nbdfuse ends with its mount; it is ours to end if it does not.
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


class Postgres:
    """A server in a folder of a device, reached by a socket outside of it."""

    def __init__(self, folder, name, data):
        self.user = pwd.getpwnam("postgres")
        self.sockets = folder / f"{name}-sockets"
        self.sockets.mkdir()
        os.chown(self.sockets, self.user.pw_uid, self.user.pw_gid)
        self.data = data
        self.log = folder / f"{name}-postgres.log"
        self.log.touch()
        os.chown(self.log, self.user.pw_uid, self.user.pw_gid)
        self.process = None

    def as_postgres(self, *command):
        return ["runuser", "-u", "postgres", "--", *map(str, command)]

    def init(self):
        self.data.mkdir()
        os.chown(self.data, self.user.pw_uid, self.user.pw_gid)
        run(*self.as_postgres(BIN / "initdb", "-D", self.data, "--auth=trust", "--no-locale", "-E", "UTF8"), cwd="/")

    def start(self, timeout=60):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.as_postgres(BIN / "postgres", "-D", self.data, "-k", self.sockets, "-c", "listen_addresses=",
                                 "-c", "shared_buffers=64MB", "-c", "max_wal_size=256MB", "-c", "checkpoint_timeout=30s"),
                stdout=log, stderr=log, cwd="/")
        eventually("PostgreSQL answers", lambda: self.answers(), timeout=timeout)

    def answers(self):
        if self.process.poll() is not None:
            raise Failed("PostgreSQL has ended:\n" + self.log.read_text(errors="replace")[-3000:])
        return subprocess.run(self.as_postgres(BIN / "pg_isready", "-q", "-h", self.sockets), check=False, cwd="/").returncode == 0

    def query(self, sql, timeout=60):
        return run(*self.as_postgres(BIN / "psql", "-h", self.sockets, "-d", "postgres", "-qAtX", "-v", "ON_ERROR_STOP=1",
                                     "-c", sql), timeout=timeout, cwd="/").decode().strip()

    def stop(self, how="fast"):
        if self.process is None:
            return
        signal = {"fast": "INT", "immediate": "QUIT"}[how]
        pid = self.data / "postmaster.pid"
        try:
            number = pid.read_text().split()[0]
            subprocess.run(["kill", f"-{signal}", number], check=False)
        except (OSError, IndexError):
            # The device is gone: the one process that was started here ends its own children.
            self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None


class Witness(threading.Thread):
    """Commits rows one after the other, and notes when each was confirmed."""

    def __init__(self, postgres, begin=0):
        """Counts on behind row `begin`."""
        super().__init__(daemon=True)
        self.postgres = postgres
        self.begin = begin
        self.confirmed = []
        self.ended = threading.Event()
        self.process = subprocess.Popen(
            postgres.as_postgres(BIN / "psql", "-h", postgres.sockets, "-d", "postgres", "-AtX", "-v", "ON_ERROR_STOP=1"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/")

    def run(self):
        number = self.begin
        try:
            while not self.ended.is_set():
                number += 1
                self.process.stdin.write(f"INSERT INTO witness VALUES ({number});\n".encode())
                self.process.stdin.flush()
                if self.process.stdout.readline().strip() != b"INSERT 0 1":
                    break
                self.confirmed.append(time.monotonic())
        except (BrokenPipeError, OSError):
            pass

    def end(self):
        self.ended.set()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.join(timeout=10)


class Watch(threading.Thread):
    """Reads the RPO that is shown: (when it held at the latest, the RPO in seconds)."""

    def __init__(self, cluster):
        super().__init__(daemon=True)
        self.cluster = cluster
        self.shown = None
        self.ended = threading.Event()

    def run(self):
        while not self.ended.is_set():
            asked = time.monotonic()
            try:
                rpo = self.cluster.status()["rpo"]
            except Failed:
                continue
            if rpo and rpo["now_ms"] is not None:
                # What is told was true that long before the question, or later.
                self.shown = (asked - (rpo["report_age_ms"] or 0) / 1000, rpo["now_ms"] / 1000)
            time.sleep(0.02)

    def end(self):
        self.ended.set()
        self.join(timeout=70)


class Play:
    """The steps, each a test; what one leaves behind the next begins with."""

    def __init__(self, folder):
        self.folder = folder
        self.devices = []
        self.servers = []
        self.cluster = None
        self.bench = None
        self.witness = None
        self.watch = None

    def protect(self):
        self.cluster = Cluster(self.folder, {"pg": SIZE})

    def install(self):
        device = Device(self.folder, "source", self.cluster.uri("pg"))
        self.devices.append(device)
        run("mkfs.ext4", "-q", "-F", device.loop)
        device.attach()
        server = Postgres(self.folder, "source", device.mount / "data")
        self.servers.append(server)
        server.init()
        server.start()
        server.query("CREATE TABLE witness (n bigint PRIMARY KEY)")
        run(*server.as_postgres(BIN / "pgbench", "-h", server.sockets, "-i", "-q", "-s", "4", "postgres"), timeout=300, cwd="/")

    def work(self):
        server = self.servers[0]
        self.cluster.settle(timeout=120)
        with open(self.folder / "pgbench.log", "ab") as log:
            self.bench = subprocess.Popen(
                server.as_postgres(BIN / "pgbench", "-h", server.sockets, "-c", "4", "-j", "1", "-T", "600", "-n", "postgres"),
                stdout=log, stderr=log, cwd="/")
        self.witness = Witness(server)
        self.witness.start()
        self.watch = Watch(self.cluster)
        self.watch.start()
        time.sleep(WORK)
        expect(self.bench.poll() is None, "pgbench has ended:\n" + (self.folder / "pgbench.log").read_text()[-2000:])
        expect(len(self.witness.confirmed) > 100, f"only {len(self.witness.confirmed)} commits in {WORK} s")
        expect(self.watch.shown is not None, "no RPO is shown")

    def disaster(self):
        self.cluster.source.kill()
        self.killed = time.monotonic()
        self.watch.end()
        self.bench.kill()
        self.bench.wait()
        self.witness.end()
        self.servers[0].stop("immediate")
        self.devices[0].close()
        asked, rpo = self.watch.shown
        #: Commits confirmed before this moment must be there.
        self.promised = asked - rpo
        shown = (self.killed - self.promised) * 1000
        print(f"the RPO at the kill was {shown:.0f} ms as shown, {len(self.witness.confirmed)} commits were confirmed")
        expect(shown < 5000, "an RPO of that size promises nothing")

    def fail_over(self):
        begun = time.monotonic()
        done = self.cluster.command("failover", "start", Cluster.GROUP, "--to", "latest", "--unconfirmed", Cluster.GROUP)
        expect(done["state"] == "done", json.dumps(done, indent=1))
        exports = done["result"]["view"]["exports"]
        self.view = next(u for e in exports for u in e["uris"] if u.startswith("nbd+unix"))
        print(f"failover took {time.monotonic() - begun:.2f} s")

    def recover(self):
        device = Device(self.folder, "view", self.view)
        self.devices.append(device)
        device.attach()
        server = Postgres(self.folder, "view", device.mount / "data")
        # As after a power cut of the first machine: its lock file names a process that is not there.
        (server.data / "postmaster.pid").unlink(missing_ok=True)
        self.servers.append(server)
        server.start(timeout=120)
        expect("database system was not properly shut down" in server.log.read_text(), "PostgreSQL had nothing to recover")

    def nothing_missing(self):
        server = self.servers[-1]
        count, highest = map(int, server.query("SELECT count(*), coalesce(max(n), 0) FROM witness").split("|"))
        expect(count == highest, f"{count} rows, the highest is {highest}: there is a gap")
        confirmed = self.witness.confirmed
        promised = sum(at <= self.promised for at in confirmed)
        lost = (self.killed - confirmed[count]) * 1000 if count < len(confirmed) else 0.0
        print(f"{count} rows of {len(confirmed)} confirmed; {promised} were promised; lost: the last {lost:.0f} ms")
        expect(count >= promised, f"row {count + 1} was confirmed {lost:.0f} ms before the kill and is missing")
        expect(count <= len(confirmed) + 1, f"{count} rows, but only {len(confirmed)} were ever confirmed")

    def books_balance(self):
        sums = self.servers[-1].query(
            "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(bbalance) FROM pgbench_branches), "
            "(SELECT sum(tbalance) FROM pgbench_tellers), (SELECT coalesce(sum(delta), 0) FROM pgbench_history)").split("|")
        expect(len(set(sums)) == 1, f"accounts, branches, tellers, history: {sums}")
        bad = self.servers[-1].query("CREATE EXTENSION IF NOT EXISTS amcheck; SELECT count(*) FROM (SELECT "
                                     "bt_index_check(c.oid, true) FROM pg_class c JOIN pg_am a ON a.oid = c.relam "
                                     "WHERE a.amname = 'btree' AND c.relkind = 'i' AND c.relpersistence = 'p') AS checked")
        expect(int(bad) > 50, f"only {bad} indexes were checked")

    def goes_on(self):
        server = self.servers[-1]
        run(*server.as_postgres(BIN / "pgbench", "-h", server.sockets, "-c", "2", "-t", "200", "-n", "postgres"), cwd="/")
        server.query("INSERT INTO witness SELECT coalesce(max(n), 0) + 1 FROM witness; CHECKPOINT")
        rows = server.query("SELECT count(*) FROM witness")
        server.stop()
        device = self.devices[-1]
        device.detach()
        run("e2fsck", "-f", "-n", device.loop)
        device.attach()
        server.start()
        expect(server.query("SELECT count(*) FROM witness") == rows, "rows are missing after a clean stop")

    def close(self):
        for end in (self.watch, self.witness):
            if end and end.is_alive():
                end.end()
        if self.bench and self.bench.poll() is None:
            self.bench.kill()
            self.bench.wait()
        for server in self.servers:
            server.stop("immediate")
        for device in self.devices:
            device.close()
        if self.cluster:
            self.cluster.close()


def able():
    """Why this machine cannot, or nothing."""
    if os.geteuid() != 0:
        return "needs root"
    if not os.path.exists("/dev/fuse"):
        return "needs /dev/fuse"
    if subprocess.run(["losetup", "--find"], capture_output=True, check=False).returncode != 0:
        return "needs loop devices"
    if not shutil.which("nbdfuse"):
        return "needs nbdfuse"
    return None


def main():
    reason = able()
    if reason:
        print(f"skip - PostgreSQL on a protected disk: {reason}")
        return
    tests = Tests()
    with workspace("postgres") as folder:
        os.chmod(folder, 0o755)
        play = Play(folder)
        try:
            for name, step in (
                ("a pair protects the disk", play.protect),
                ("ext4 and PostgreSQL on it", play.install),
                ("pgbench and a witness commit", play.work),
                ("the source proxy is killed", play.disaster),
                ("the group fails over", play.fail_over),
                ("PostgreSQL recovers from the replica", play.recover),
                ("no commit older than the RPO shown is missing", play.nothing_missing),
                ("pgbench's books balance and indexes are whole", play.books_balance),
                ("it goes on on the replica", play.goes_on),
            ):
                if not tests.run(f"postgres: {name}", step):
                    break
        finally:
            play.close()
    tests.end()


if __name__ == "__main__":
    sys.exit(main())
