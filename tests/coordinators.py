#!/usr/bin/python3
"""Three coordinators that share three etcd members, all on loopback, while a group replicates and a policy changes all
the time: the leader is killed, stopped and woken late, a member of etcd dies, both at once. Judged by etcd's own history:
every commit was made by who led then, every change that was answered happened once, none twice.

`tests/coordinators.py 100` plays a hundred rounds. Needs etcd (etcd-server) and python3-nbd.
"""

import base64
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import nbd

from cluster import AFTERIMAGE, MIB, Cluster, Failed, Process, Tests, eventually, expect, free_port, workspace

SIZE = 32 * MIB
BLOCK = 4096
NAMES = ("a", "b", "c")
PREFIX = "afterimage"
# From a coordinator's death until another answers: its lease, and a machine that is busy.
TAKEOVER = 45
# What the RPO may be at most while coordinators come and go, milliseconds; a lease is five seconds.
RPO_MS = 3000


class Etcd:
    """Three members."""

    def __init__(self, folder):
        self.folder = folder
        self.clients = {name: free_port() for name in NAMES}
        peers = {name: free_port() for name in NAMES}
        self.cluster = ",".join(f"{name}=http://127.0.0.1:{port}" for name, port in peers.items())
        self.peers = peers
        self.processes = {}
        for name in NAMES:
            self.start(name)

    def start(self, name):
        client, peer = (f"http://127.0.0.1:{port}" for port in (self.clients[name], self.peers[name]))
        with open(self.folder / f"etcd-{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                ["etcd", "--name", name, "--data-dir", self.folder / f"etcd-{name}", "--max-txn-ops", "4096",
                 "--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer,
                 "--initial-advertise-peer-urls", peer, "--initial-cluster", self.cluster],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self, name):
        self.processes[name].kill()
        self.processes[name].wait()

    def urls(self):
        return [f"http://127.0.0.1:{port}" for port in self.clients.values()]

    def ask(self, path, body, timeout=10):
        """By the JSON that etcd speaks as well: of whichever member answers."""
        error = None
        for url in self.urls():
            try:
                request = urllib.request.Request(f"{url}/v3/{path}", json.dumps(body).encode())
                return urllib.request.urlopen(request, timeout=timeout)
            except OSError as caught:
                error = caught
        raise Failed(f"no member of etcd answers {path}: {error}")

    def get(self, key):
        with self.ask("kv/range", {"key": encode(key)}) as answer:
            found = json.load(answer)
        kvs = found.get("kvs", [])
        return int(found["header"]["revision"]), decode(kvs[0]["value"]) if kvs else None

    def history(self):
        """Every change of every key: (revision, key, value or none)."""
        newest, _ = self.get(f"{PREFIX}/seq")
        body = {"create_request": {"key": encode(f"{PREFIX}/"), "range_end": encode(f"{PREFIX}0"), "start_revision": "1"}}
        changes = []
        seq = int(json.load(self.ask("kv/range", {"key": encode(f"{PREFIX}/seq")}))["kvs"][0]["mod_revision"])
        with self.ask("watch", body, timeout=60) as stream:
            for line in stream:
                for event in json.loads(line)["result"].get("events", []):
                    kv = event["kv"]
                    gone = event.get("type") == "DELETE"
                    changes.append((int(kv["mod_revision"]), decode(kv["key"]), None if gone else decode(kv.get("value", ""))))
                if changes and changes[-1][0] >= seq:
                    break
        expect(newest >= seq, "etcd's revisions rise")
        return changes

    def close(self):
        for process in self.processes.values():
            process.kill()
            process.wait()


def encode(text):
    return base64.b64encode(text.encode()).decode()


def decode(text):
    return base64.b64decode(text).decode()


class Three(Cluster):
    """A group of one disk under three coordinators."""

    def __init__(self, folder, etcd):
        self.folder, self.etcd, self.processes = folder, etcd, []
        self.disks = {"data": SIZE}
        self.ports = {name: free_port() for name in NAMES}
        self.addresses = ",".join(f"127.0.0.1:{port}" for port in self.ports.values())
        self.coordinators = {}
        self.identity = folder / "admin.json"
        self.launch("a")
        made = folder / "coordinator-a" / "admin.json"
        eventually("the first coordinator leads", lambda: self.coordinators["a"].check() and made.exists(), 30)
        shutil.copy(made, self.identity)
        os.chmod(self.identity, 0o600)
        self.refused_without_files()
        for name in NAMES[1:]:
            (folder / f"coordinator-{name}").mkdir(mode=0o700, exist_ok=True)
            for file in ("ca.pem", "keys.bin"):
                shutil.copy(folder / "coordinator-a" / file, folder / f"coordinator-{name}" / file)
            self.launch(name)
        eventually("a coordinator answers", lambda: self.try_command("status"), TAKEOVER)
        self.source_socket, self.views_socket = folder / "source.sock", folder / "views.sock"
        self.target = self.proxy("target", "--journal", folder / "journal", "--listen", f"127.0.0.1:{free_port()}",
                                 "--views", f"unix:{self.views_socket}")
        self.source = self.proxy("source", "--nbd", f"unix:{self.source_socket}")
        eventually("both proxies are connected", self.proxies_connected)
        self.command("policy", "create", "gold", "--retention", "1000s", "--cut-interval", "200ms")
        image = folder / "data.img"
        with open(image, "wb") as out:
            out.truncate(SIZE)
        self.command("group", "create", self.GROUP, "--policy", "gold", "--source", "source", "--target", "target",
                     "--disk", f"data={image}")
        eventually("the group is protected", self.protected, timeout=60)

    def launch(self, name):
        members = [part for url in self.etcd.urls() for part in ("--etcd", url)]
        self.coordinators[name] = Process(self.folder, f"coordinator-{name}", "coordinator", "--data-dir",
                                          self.folder / f"coordinator-{name}", "--listen",
                                          f"127.0.0.1:{self.ports[name]}", "--advertise", self.addresses, *members)

    def refused_without_files(self):
        """Without the files of the others it does not begin: it would lock everybody out once it led."""
        members = [part for url in self.etcd.urls() for part in ("--etcd", url)]
        eventually("the first has said what it has", lambda: self.etcd.get(f"{PREFIX}/shared")[1])
        done = subprocess.run([AFTERIMAGE, "coordinator", "--data-dir", self.folder / "stranger", "--listen",
                               "127.0.0.1:0", *members], capture_output=True, timeout=60, check=False)
        expect(done.returncode != 0 and b"ca.pem" in done.stderr + done.stdout,
               f"a coordinator without the files was let in: {done.returncode} {done.stderr!r}")

    def proxy(self, name, *args, port=None):
        token = self.command("token", "create", name, "--role", "proxy")["token"]
        return self.begin(name, "proxy", "--name", name, "--coordinator", self.addresses, "--state",
                          self.folder / f"{name}-state", *args, env={"AFTERIMAGE_TOKEN": token})

    def leader(self):
        """Its name; none if nobody leads."""
        _, value = self.etcd.get(f"{PREFIX}/leader")
        port = int(json.loads(value)["address"].rsplit(":", 1)[1]) if value else None
        return next((name for name in NAMES if self.ports[name] == port), None)

    def close(self):
        super().close()
        for process in self.coordinators.values():
            if process.alive():
                process.process.send_signal(signal.SIGCONT)
            process.stop()


class Worker:
    """Does something again and again until it is stopped."""

    def __init__(self, work):
        self.stopped = threading.Event()
        self.error = None
        self.thread = threading.Thread(target=self.run, args=(work,))
        self.thread.start()

    def run(self, work):
        try:
            while not self.stopped.is_set():
                work()
        except Exception as error:  # noqa: BLE001: told by stop()
            self.error = error

    def stop(self):
        self.stopped.set()
        self.thread.join(timeout=120)
        if self.error:
            raise self.error


class Rounds:
    """The faults, and what is judged."""

    def __init__(self, three, rng):
        self.three, self.rng = three, rng
        self.tried, self.answered = 0, set()
        self.writes, self.slowest = 0, 0.0
        self.handle = nbd.NBD()
        self.handle.connect_uri(three.uri("data"))
        self.changes = Worker(self.change)
        self.writer = Worker(self.write)

    def change(self):
        """Each change has a number of its own and is asked for once."""
        self.tried += 1
        number = self.tried
        if self.three.try_command("policy", "update", "gold", "--retention", f"{1000 + number}s", "--timeout", "8s"):
            self.answered.add(number)
        time.sleep(0.05)

    def write(self):
        begun = time.monotonic()
        self.handle.pwrite(self.rng.randbytes(BLOCK), self.rng.randrange(SIZE // BLOCK) * BLOCK)
        self.slowest = max(self.slowest, time.monotonic() - begun)
        self.writes += 1
        time.sleep(0.005)

    def again(self):
        """Until changes are answered again, and both proxies and the RPO are as they should be."""
        done = len(self.answered)
        eventually("changes are answered again", lambda: self.changes.error or len(self.answered) > done, TAKEOVER)
        eventually("both proxies are connected again", lambda: (self.three.try_command("status") or {}) and
                   self.connected(), TAKEOVER)

        def known():
            rpo = (self.three.status() or {}).get("rpo")
            return rpo if rpo and rpo["now_ms"] is not None else None
        rpo = eventually("the RPO is known again", known, TAKEOVER)
        expect(rpo["now_ms"] < RPO_MS, f"replication noticed: {rpo}")

    def connected(self):
        try:
            return self.three.proxies_connected()
        except Failed:
            return False

    def leader(self):
        return eventually("somebody leads", self.three.leader, TAKEOVER)

    def kill_leader(self):
        name = self.leader()
        self.three.coordinators[name].kill()
        self.again()
        expect(self.leader() != name, "a dead coordinator leads")
        self.three.launch(name)

    def kill_member(self):
        name = self.rng.choice(NAMES)
        self.three.etcd.kill(name)
        self.again()
        self.three.etcd.start(name)

    def stop_leader(self):
        """Woken long after another leads; by then its changes are nobody's."""
        name = self.leader()
        process = self.three.coordinators[name].process
        process.send_signal(signal.SIGSTOP)
        try:
            eventually("another leads", lambda: self.three.leader() not in (None, name), TAKEOVER)
            self.again()
        finally:
            process.send_signal(signal.SIGCONT)
        time.sleep(1.0)
        self.three.coordinators[name].check()
        self.again()

    def kill_both(self):
        name, member = self.leader(), self.rng.choice(NAMES)
        self.three.etcd.kill(member)
        self.three.coordinators[name].kill()
        self.again()
        self.three.etcd.start(member)
        self.three.launch(name)

    def fail_over(self):
        """A leader dies in the middle of an operation: the next one ends it."""
        self.writer.stop()
        self.handle.shutdown()
        self.three.replica_is_source()
        begun = threading.Thread(target=self.three.try_command, args=(
            "failover", "start", Cluster.GROUP, "--to", "latest", "--timeout", "10s"))
        begun.start()
        eventually("the operation is recorded", lambda: any(
            key.startswith(f"{PREFIX}/o/operations/") for _, key, _ in self.three.etcd.history()), 30, 0.005)
        name = self.leader()
        self.three.coordinators[name].kill()
        begun.join(timeout=90)
        eventually("the group is failed over", lambda: (self.three.try_command("status", Cluster.GROUP) or
                   {"groups": [{"phase": None}]})["groups"][0]["phase"] == "failed-over", 60)
        self.three.launch(name)

    def judge(self):
        """By what etcd remembers."""
        self.changes.stop()
        leader, held, terms, values, versions, generations = None, set(), [], [], [], []
        operations = set()
        for revision, key, value in self.three.etcd.history():
            name = key.removeprefix(f"{PREFIX}/")
            if name == "leader":
                leader = revision if value else None
                held.add(leader)
            elif name == "seq":
                expect(leader is not None and value.split()[0] == str(leader),
                       f"revision {revision} was written by {value}, but {leader} led")
            elif name == "o/term":
                terms.append(int(value))
            elif name == "o/policies/default/gold":
                policy = json.loads(value)
                versions.append(policy["version"])
                values.append(policy["promises"]["retention_s"] - 1000)
            elif name == "o/groups/default/shop":
                generations.append(json.loads(value)["generation"])
            elif name.startswith("o/operations/"):
                operations.add(name)
        expect(terms == sorted(set(terms)), f"terms do not rise: {terms}")
        expect(versions == list(range(versions[0], versions[0] + len(versions))), f"versions: {versions}")
        expect(values == sorted(set(values)), f"a change was done twice, or one was overtaken: {values}")
        missing = self.answered - set(values)
        expect(not missing, f"answered and not there: {sorted(missing)}")
        expect(set(values) <= set(range(self.tried + 1)), "a change that nobody asked for")
        expect(len(operations) <= 1, f"one failover was asked for: {operations}")
        expect(generations[-1] - generations[0] == len(operations), f"the generation rises once: {generations}")
        expect(self.answered and self.writes, "nothing was tried")
        print(f"# {len(self.answered)} of {self.tried} changes answered, {len(terms)} times in office, "
              f"{self.writes} writes, slowest {self.slowest:.2f} s", flush=True)


def main():
    tests = Tests()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    seed = int(os.environ.get("SEED", "1"))
    with workspace("coordinators") as folder:
        etcd = Etcd(folder)
        three = None
        try:
            expect(answers(etcd), "etcd does not answer")
            three = Three(folder, etcd)
            played = Rounds(three, random.Random(seed))
            try:
                kinds = [played.kill_leader, played.stop_leader, played.kill_member, played.kill_both]
                for i in range(rounds):
                    kind = kinds[i] if i < len(kinds) else played.rng.choice(kinds)
                    if not tests.run(f"coordinators, round {i + 1}: {kind.__name__.replace('_', ' ')}", kind):
                        raise Failed("the rest is not played")
                tests.run("a leader dies in a failover, the next one ends it", played.fail_over)
                tests.run("no change is lost, done twice or mixed with another leader's", played.judge)
            finally:
                played.changes.stopped.set()
                played.writer.stopped.set()
                played.changes.thread.join(timeout=60)
                played.writer.thread.join(timeout=60)
        except Failed as error:
            tests.failed += 1
            print(f"not ok - three coordinators on three members of etcd\n{error}", flush=True)
            for log in sorted(pathlib.Path(folder).glob("coordinator-?.log")):
                print(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-25:]), flush=True)
        finally:
            if three:
                three.close()
            etcd.close()
    tests.end()


def answers(etcd):
    """Once a majority has found itself."""
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        try:
            etcd.get("x")
            return True
        except Failed:
            time.sleep(0.2)
    return False


if __name__ == "__main__":
    main()
