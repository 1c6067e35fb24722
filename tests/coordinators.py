#!/usr/bin/python3
"""Three coordinators that share three etcd members, all on loopback and over TLS both ways, while a group replicates and
a policy changes all the time. It begins with a single coordinator, whose state a command moves into the etcd. Then the
leader is killed, stopped and woken late, cut off from etcd; members of etcd die, hang, cannot be reached. Judged by etcd's
own history: every commit was made by who led then, every change that was answered happened once, none twice.

`tests/coordinators.py 100` plays a hundred rounds. Needs etcd (etcd-server), openssl and python3-nbd.
"""

import base64
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request

import nbd

from cluster import AFTERIMAGE, MIB, Cluster, Failed, Process, Tests, digest, eventually, expect, free_port, run, workspace

SIZE = 32 * MIB
BLOCK = 4096
NAMES = ("a", "b", "c")
PREFIX = "afterimage"
# From a coordinator's death until another answers: its lease, and a machine that is busy.
TAKEOVER = 45
# What a source whose coordinators come and go may lose at most, milliseconds. A lease is five seconds: were the stream to
# wait for a leader, this could not be met.
RPO_MS = 3000
ROUNDS = 10
# Fields of documents that come from the store as they are.
STORED = {"policies", "groups", "disks", "proxies", "policy", "group", "disk", "proxy", "uid", "version", "description",
          "rpo_target_ms", "cut_interval_ms", "retention_s", "journal_budget_bytes", "compression", "warn_after_ms",
          "error_after_ms", "clear_after_ms", "lease_ms", "sync_deadline_ms", "created", "updated", "source", "target",
          "slot", "path", "serial", "size_bytes", "block_bytes", "generation", "export", "key_pin", "certificate_expires",
          "joined", "data_address", "nbd_addresses"}


class Between:
    """Stands before a member of etcd for one coordinator. Cut, it passes nothing on and closes nothing, as a network that
    is gone; mended, what was on its way arrives late."""

    def __init__(self, to):
        self.to, self.passes, self.ends = to, threading.Event(), []
        self.passes.set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                ours, _ = self.listener.accept()
                threading.Thread(target=self.pair, args=(ours,), daemon=True).start()

    def pair(self, ours):
        self.passes.wait()
        try:
            theirs = socket.create_connection(("127.0.0.1", self.to), timeout=5)
        except OSError:
            ours.close()
            return
        theirs.settimeout(None)
        self.ends += [ours, theirs]
        threading.Thread(target=self.carry, args=(ours, theirs), daemon=True).start()
        self.carry(theirs, ours)

    def carry(self, one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                self.passes.wait()
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.passes.set()
        self.listener.close()
        for end in self.ends:
            end.close()


class Authority:
    """A CA of its own for etcd: certificates for members and clients."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        self.ca = folder / "ca.pem"
        run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-subj", "/CN=etcd CA", "-keyout", folder / "ca.key", "-out", self.ca)
        self.issue("member", "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth")
        self.issue("client", "extendedKeyUsage=clientAuth")

    def issue(self, name, extensions):
        (self.folder / f"{name}.ext").write_text(extensions)
        run("openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
            "-keyout", self.folder / f"{name}.key", "-out", self.folder / f"{name}.csr")
        run("openssl", "x509", "-req", "-in", self.folder / f"{name}.csr", "-CA", self.ca, "-CAkey", self.folder / "ca.key",
            "-CAcreateserial", "-days", "2", "-extfile", self.folder / f"{name}.ext", "-out", self.folder / f"{name}.pem")

    def context(self):
        made = ssl.create_default_context(cafile=self.ca)
        made.load_cert_chain(self.folder / "client.pem", self.folder / "client.key")
        return made


class Etcd:
    """Three members, which speak with nobody who has no certificate of their CA."""

    def __init__(self, folder):
        self.folder = folder
        self.authority = Authority(folder / "etcd-ca")
        self.context = self.authority.context()
        self.clients = {name: free_port() for name in NAMES}
        self.peers = {name: free_port() for name in NAMES}
        self.cluster = ",".join(f"{name}=http://127.0.0.1:{port}" for name, port in self.peers.items())
        self.processes = {}
        for name in NAMES:
            self.start(name)

    def start(self, name):
        client, peer = f"https://127.0.0.1:{self.clients[name]}", f"http://127.0.0.1:{self.peers[name]}"
        ca = self.authority
        with open(self.folder / f"etcd-{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                ["etcd", "--name", name, "--data-dir", self.folder / f"etcd-{name}", "--max-txn-ops", "4096",
                 "--cert-file", ca.folder / "member.pem", "--key-file", ca.folder / "member.key", "--client-cert-auth",
                 "--trusted-ca-file", ca.ca, "--listen-client-urls", client, "--advertise-client-urls", client,
                 "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", self.cluster],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self, name):
        self.processes[name].kill()
        self.processes[name].wait()

    def ask(self, path, body, timeout=3, names=NAMES):
        """By the JSON that etcd speaks as well: of whichever member answers."""
        error = None
        for name in names:
            try:
                url = f"https://127.0.0.1:{self.clients[name]}/v3/{path}"
                request = urllib.request.Request(url, json.dumps(body).encode())
                return urllib.request.urlopen(request, timeout=timeout, context=self.context)
            except OSError as caught:
                error = caught
        raise Failed(f"no member of etcd answers {path}: {error}")

    def get(self, key):
        with self.ask("kv/range", {"key": encode(key)}) as answer:
            found = json.load(answer)
        kvs = found.get("kvs", [])
        return int(found["header"]["revision"]), decode(kvs[0]["value"]) if kvs else None

    def under(self, prefix):
        """All keys that begin so, with their values."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        with self.ask("kv/range", {"key": encode(prefix), "range_end": encode(end)}) as answer:
            found = json.load(answer)
        return {decode(kv["key"]): decode(kv["value"]) for kv in found.get("kvs", [])}

    def leader(self):
        """The member that leads among themselves."""
        for name in NAMES:
            with contextlib.suppress(Failed), self.ask("maintenance/status", {}, names=[name]) as answer:
                found = json.load(answer)
                if found.get("leader") == found["header"]["member_id"]:
                    return name
        return None

    def history(self):
        """Every change of every key: (revision, key, value or none)."""
        newest, _ = self.get(f"{PREFIX}/seq")
        body = {"create_request": {"key": encode(f"{PREFIX}/"), "range_end": encode(f"{PREFIX}0"), "start_revision": "1"}}
        changes = []
        with self.ask("kv/range", {"key": encode(f"{PREFIX}/seq")}) as answer:
            seq = int(json.load(answer)["kvs"][0]["mod_revision"])
        with self.ask("watch", body, timeout=60) as stream:
            for line in stream:
                told = json.loads(line)["result"]
                expect(not told.get("canceled"), f"etcd does not remember: {told}")
                for event in told.get("events", []):
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
    """A group of one disk under three coordinators, which began under one."""

    def __init__(self, folder, etcd, tests):
        self.folder, self.etcd, self.processes = folder, etcd, []
        self.disks = {"data": SIZE}
        self.ports = {name: free_port() for name in NAMES}
        self.addresses = ",".join(f"127.0.0.1:{port}" for port in self.ports.values())
        self.between = {name: {member: Between(port) for member, port in etcd.clients.items()} for name in NAMES}
        self.coordinators = {}
        self.identity = folder / "admin.json"
        self.launch("a", alone=True)
        made = folder / "coordinator-a" / "admin.json"
        eventually("the first coordinator runs", lambda: self.coordinators["a"].check() and made.exists(), 30)
        shutil.copy(made, self.identity)
        os.chmod(self.identity, 0o600)
        eventually("it answers", lambda: self.try_command("status"))
        self.source_socket, self.views_socket = folder / "source.sock", folder / "views.sock"
        self.target = self.proxy("target", "--journal", folder / "journal", "--listen", f"127.0.0.1:{free_port()}",
                                 "--views", f"unix:{self.views_socket}")
        self.source = self.proxy("source", "--nbd", f"unix:{self.source_socket}")
        eventually("both proxies are connected", self.proxies_connected)
        self.command("policy", "create", "gold", "--retention", "1000s", "--cut-interval", "200ms")
        self.command("policy", "create", "silver", "--retention", "2h", "--description", "moved with the rest")
        image = folder / "data.img"
        with open(image, "wb") as out:
            out.truncate(SIZE)
        self.command("group", "create", self.GROUP, "--policy", "gold", "--source", "source", "--target", "target",
                     "--disk", f"data={image}")
        eventually("the group is protected", self.protected, timeout=60)
        if not tests.run("a command moves the state of one coordinator into the etcd, whole", self.move):
            raise Failed("the rest is not played")
        if not tests.run("who has not the files, or not etcd's certificate, is not let in", self.refused):
            raise Failed("the rest is not played")
        for name in NAMES[1:]:
            (folder / f"coordinator-{name}").mkdir(mode=0o700, exist_ok=True)
            for file in ("ca.pem", "keys.bin"):
                shutil.copy(folder / "coordinator-a" / file, folder / f"coordinator-{name}" / file)
            self.launch(name)
        eventually("a coordinator answers", lambda: self.try_command("status"), TAKEOVER)

    def members(self, name=None, client=True):
        """Where etcd is, for one coordinator: by its own ways; or straight."""
        ports = self.etcd.clients if name is None else {m: b.port for m, b in self.between[name].items()}
        ca = self.etcd.authority.folder
        return [*(part for port in ports.values() for part in ("--etcd", f"https://127.0.0.1:{port}")),
                "--etcd-ca", ca / "ca.pem",
                *(("--etcd-cert", ca / "client.pem", "--etcd-key", ca / "client.key") if client else ())]

    def launch(self, name, alone=False):
        self.coordinators[name] = Process(
            self.folder, f"coordinator-{name}", "coordinator", "--data-dir", self.folder / f"coordinator-{name}", "--listen",
            f"127.0.0.1:{self.ports[name]}", "--advertise", self.addresses, *([] if alone else self.members(name)))

    def refuses(self, words, *args):
        """A coordinator that does not start, or a command that does not do it, and says why."""
        done = subprocess.run([AFTERIMAGE, "coordinator", *map(str, args)], capture_output=True, timeout=60, check=False)
        said = (done.stderr + done.stdout).decode()
        expect(done.returncode != 0 and all(word in said for word in words),
               f"{args}: exit code {done.returncode}, and not all of {words} in:\n{said}")

    def stored(self):
        """What an operator sees of what is stored, without what lives: counters grow, proxies come and go."""
        def strip(value):
            if isinstance(value, dict):
                return {key: strip(inner) for key, inner in value.items() if key in STORED}
            return [strip(inner) for inner in value] if isinstance(value, list) else value
        shown = {what: strip(self.command(what, "list")) for what in ("policy", "group", "proxies")}
        expect(len(json.dumps(shown)) > 1500, f"little is compared: {shown}")
        return json.dumps(shown, sort_keys=True)

    def move(self):
        folder, single = self.folder / "coordinator-a", self.coordinators["a"]
        before = self.stored()
        move = ("move", "--data-dir", folder, *self.members())
        self.refuses(["in use", "stop the coordinator"], *move)
        expect(single.stop() == 0, "the single coordinator does not end cleanly")
        self.refuses(["state.redb", "coordinator move"], "--data-dir", folder, "--listen", "127.0.0.1:0", *self.members())
        said = json.loads(run(AFTERIMAGE, "coordinator", *move, "--json"))
        objects = self.etcd.under(f"{PREFIX}/o/")
        expect(said["objects"] == len(objects) > 5, f"{said} and {len(objects)} in etcd")
        expect(pathlib.Path(said["set_aside"]).exists() and not (folder / "state.redb").exists(), f"set aside: {said}")
        self.refuses(["state.redb"], *move)
        self.refuses(["moved into an etcd", "--etcd"], "--data-dir", folder, "--listen", "127.0.0.1:0")
        self.launch("a")
        eventually("it answers from the etcd", lambda: self.coordinators["a"].check() and self.try_command("status"), TAKEOVER)
        eventually("both proxies are connected again", self.proxies_connected, TAKEOVER)
        after = self.stored()
        expect(before == after, f"before the move:\n{before}\nafter it:\n{after}")
        eventually("the group is protected as before", self.protected, TAKEOVER)
        for proxy in (self.source, self.target):
            expect("older than" not in proxy.log.read_text(), f"a proxy was told something old:\n{proxy.tail()}")

    def refused(self):
        """Without the files of the others it would lock everybody out once it led; etcd knows its own clients."""
        eventually("the first has said what it has", lambda: self.etcd.get(f"{PREFIX}/shared")[1])
        stranger = ("--data-dir", self.folder / "stranger", "--listen", "127.0.0.1:0")
        self.refuses(["ca.pem", "keys.bin"], *stranger, *self.members())
        self.refuses(["etcd", "certificate"], *stranger, *self.members(client=False))
        other = Authority(self.folder / "other-ca").folder
        members = self.members()[:2 * len(NAMES)]
        self.refuses(["etcd", "certificate"], *stranger, *members, "--etcd-ca", other / "ca.pem", "--etcd-cert",
                     other / "client.pem", "--etcd-key", other / "client.key")
        self.refuses(["cert and key"], *stranger, *members, "--config", self.half())

    def half(self):
        half = self.folder / "half.toml"
        half.write_text(f"[etcd]\ncert = '{self.etcd.authority.folder / 'client.pem'}'\n")
        return half

    def proxy(self, name, *args, port=None):
        token = self.command("token", "create", name, "--role", "proxy")["token"]
        return self.begin(name, "proxy", "--name", name, "--coordinator", self.addresses, "--state",
                          self.folder / f"{name}-state", *args, env={"AFTERIMAGE_TOKEN": token})

    def leader(self):
        """Its name; none if nobody leads."""
        try:
            _, value = self.etcd.get(f"{PREFIX}/leader")
        except Failed:
            return None
        port = int(json.loads(value)["address"].rsplit(":", 1)[1]) if value else None
        return next((name for name in NAMES if self.ports[name] == port), None)

    def close(self):
        super().close()
        for process in self.coordinators.values():
            if process.alive():
                process.process.send_signal(signal.SIGCONT)
        for ways in self.between.values():
            for way in ways.values():
                way.passes.set()
        for process in self.coordinators.values():
            process.stop()
        for ways in self.between.values():
            for way in ways.values():
                way.close()


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
        self.rpo = []
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
        """Until changes are answered again, both proxies are connected, and the source has told what the RPO was
        meanwhile: by its own clock, also of the time in which nobody heard it."""
        done = len(self.answered)
        eventually("changes are answered again", lambda: self.changes.error or len(self.answered) > done, TAKEOVER)

        def told():
            status = self.three.try_command("status") or {}
            if sum(proxy["connected"] for proxy in status.get("proxies", [])) != 2:
                return None
            rpo = next((group["rpo"] for group in status["groups"]), None)
            return rpo if rpo and rpo["now_ms"] is not None and rpo["max_ms"] is not None else None
        rpo = eventually("proxies are connected and the RPO is known again", told, TAKEOVER)
        self.rpo.append(rpo["p99_ms"])
        expect(rpo["max_ms"] < RPO_MS, f"replication noticed: {rpo}")

    def calm(self):
        """What the RPO is when nothing happens to anybody."""
        time.sleep(3)
        self.again()
        return self.rpo.pop()

    def leader(self):
        return eventually("somebody leads", self.three.leader, TAKEOVER)

    def another(self, name):
        eventually("another leads", lambda: self.three.leader() not in (None, name), TAKEOVER)

    def kill_leader(self):
        name = self.leader()
        self.three.coordinators[name].kill()
        self.again()
        expect(self.leader() != name, "a dead coordinator leads")
        self.three.launch(name)

    def end_leader(self):
        """As at an upgrade: the next one need not wait for the lease."""
        name = self.leader()
        begun = time.monotonic()
        expect(self.three.coordinators[name].stop() == 0, "it does not end cleanly")
        ended = time.monotonic()
        self.another(name)
        expect(time.monotonic() - ended < 3, f"the office was not given back: {time.monotonic() - begun:.1f} s")
        self.again()
        self.three.launch(name)

    def kill_member(self):
        name = self.rng.choice(NAMES)
        self.three.etcd.kill(name)
        self.again()
        self.three.etcd.start(name)

    def freeze_member(self):
        """The one that leads etcd hangs, and says so to nobody."""
        name = eventually("etcd has a leader", self.three.etcd.leader, TAKEOVER)
        process = self.three.etcd.processes[name]
        process.send_signal(signal.SIGSTOP)
        try:
            self.again()
        finally:
            process.send_signal(signal.SIGCONT)

    def stop_leader(self):
        """Woken long after another leads; by then its changes are nobody's."""
        name = self.leader()
        process = self.three.coordinators[name].process
        process.send_signal(signal.SIGSTOP)
        try:
            self.another(name)
            self.again()
        finally:
            process.send_signal(signal.SIGCONT)
        self.late(name)

    def cut_leader(self):
        """Off from all of etcd, not from proxies and people; what it had sent arrives late."""
        name = self.leader()
        ways = self.three.between[name].values()
        for way in ways:
            way.passes.clear()
        try:
            self.another(name)
            self.again()
        finally:
            for way in ways:
                way.passes.set()
        self.late(name)

    def cut_way(self):
        """The leader is off from one member, each in turn: it asks another, and goes on leading."""
        name = self.leader()
        for way in self.three.between[name].values():
            way.passes.clear()
            try:
                self.again()
            finally:
                way.passes.set()
        expect(self.leader() == name, "one member that cannot be reached costs the leader its office")

    def late(self, name):
        time.sleep(0.5)
        self.three.coordinators[name].check()
        expect(self.three.leader() != name, "who came late leads at once")
        self.again()

    def kill_both(self):
        name, member = self.leader(), self.rng.choice(NAMES)
        self.three.etcd.kill(member)
        self.three.coordinators[name].kill()
        self.again()
        self.three.etcd.start(member)
        self.three.launch(name)

    def operation(self):
        """As it is stored; none if none is."""
        stored = list(self.three.etcd.under(f"{PREFIX}/o/operations/").values())
        expect(len(stored) <= 1, f"one failover was asked for: {stored}")
        return json.loads(stored[0]) if stored else None

    def fail_over(self):
        """The leader dies while a step is being done: the source is stopped, so it cannot have been done before. The next
        leader does that step, and the rest; asked again, the same request is the same operation."""
        three = self.three
        self.changes.stop()
        self.writer.stop()
        self.handle.shutdown()
        three.replica_is_source()
        wanted = digest(three.uri("data"))
        start = ("failover", "start", Cluster.GROUP, "--to", "latest", "--request-id", "the-only-one")

        def step():
            operation = self.operation()
            return operation and [s["name"] for s in operation["work"]["steps"] if s["state"] == "running"]
        source = three.source.process
        source.send_signal(signal.SIGSTOP)
        try:
            begun = threading.Thread(target=three.try_command, args=(*start, "--timeout", "20s"))
            begun.start()
            eventually("the fence is recorded as begun", lambda: step() == ["fence"], 30, 0.01)
            name = self.leader()
            three.coordinators[name].kill()
            expect(step() == ["fence"], f"the step has ended while the source was stopped: {self.operation()}")
        finally:
            source.send_signal(signal.SIGCONT)
        eventually("the next leader has ended the operation", lambda: self.operation()["ended_ns"], 90)
        work = self.operation()["work"]
        expect((work["state"], work["facts"]["fence"]) == ("done", "confirmed"), f"it has ended otherwise: {work}")
        begun.join(timeout=90)
        expect(self.leader() != name, "a dead coordinator leads")
        again = three.command(*start)
        expect(again["operation"] == self.operation()["uid"], f"asked again it is another operation: {again}")
        status = three.status()
        expect(status["phase"] == "failed-over", f"the group is {status['phase']}")
        view = three.command("view", "list", Cluster.GROUP)["views"]
        uris = [uri for one in view for export in one["exports"] for uri in export["uris"] if uri.startswith("nbd+unix")]
        expect(digest(uris[0]) == wanted, "the view does not show what the source held")
        three.launch(name)

    def judge(self):
        """By what etcd remembers."""
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
        expect(len(operations) == 1, f"one failover was asked for: {operations}")
        expect(generations[-1] - generations[0] == 1, f"the generation rises once: {generations}")
        expect(len(self.answered) > 2 * len(terms) and self.writes, "little was tried")
        print(f"# {len(self.answered)} of {self.tried} changes answered, {len(terms)} times in office, "
              f"{self.writes} writes, slowest {self.slowest:.2f} s", flush=True)


def play(tests, three, rounds, seed):
    played = Rounds(three, random.Random(seed))
    try:
        normal = played.calm()
        kinds = [played.kill_leader, played.stop_leader, played.cut_leader, played.kill_member, played.kill_both,
                 played.freeze_member, played.end_leader, played.cut_way]
        begun = time.monotonic()
        for i in range(rounds):
            kind = kinds[i] if i < len(kinds) else played.rng.choice(kinds)
            if not tests.run(f"coordinators, round {i + 1}: {kind.__name__.replace('_', ' ')}", kind):
                raise Failed("the rest is not played")
        took = time.monotonic() - begun
        tests.run("a leader dies in the middle of a step, the next one ends the failover", played.fail_over)
        tests.run("no change is lost, done twice or mixed with another leader's", played.judge)
        told = sorted(played.rpo)
        print(f"# {rounds} rounds in {took:.0f} s; p99 of the RPO over each, against the calm before: median "
              f"{told[len(told) // 2] / max(normal, 0.001):.2f}, highest {told[-1] / max(normal, 0.001):.2f}", flush=True)
    finally:
        played.changes.stopped.set()
        played.writer.stopped.set()
        played.changes.thread.join(timeout=60)
        played.writer.thread.join(timeout=60)


def main():
    tests = Tests()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    seed = int(os.environ.get("SEED", "1"))
    with workspace("coordinators") as folder:
        etcd = Etcd(folder)
        three = None
        try:
            eventually("etcd answers", lambda: answers(etcd), 60)
            # Closed in the end, also if it does not come to be.
            three = Three.__new__(Three)
            three.processes, three.coordinators, three.between = [], {}, {}
            three.__init__(folder, etcd, tests)
            play(tests, three, rounds, seed)
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
    try:
        return etcd.get("x")
    except Failed:
        return None


if __name__ == "__main__":
    main()
