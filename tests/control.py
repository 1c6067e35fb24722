#!/usr/bin/python3
"""The control plane on real processes: what policies promise is kept, at the source."""

import hmac
import http.server
import json
import os
import threading
import time

import nbd

import certificates
import keys
from cluster import AFTERIMAGE, MIB, Cluster, Tests, digest, eventually, expect, free_port, run, workspace
from scene import Relay
import targets

SIZE = 64 * MIB


def refused(cluster, *args):
    """A command that must be refused: its error."""
    import subprocess
    done = subprocess.run([str(AFTERIMAGE), *map(str, args), "--json", "--yes", "--identity", str(cluster.identity)],
                          capture_output=True, timeout=60, check=False)
    expect(done.returncode != 0, f"{args} was not refused")
    return json.loads(done.stderr.decode().strip().splitlines()[-1])["error"]


class Receiver:
    """A web server that takes events, or refuses them."""

    def __init__(self):
        self.got, self.refusals, self.status = [], 0, 200
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if receiver.status == 200:
                    receiver.got.append((self.headers, body))
                else:
                    receiver.refusals += 1
                self.send_response(receiver.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/events?from=test"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def hooks(folder):
    """Events reach a web server and a script, at least once, over refusals and a killed coordinator."""
    receiver, secret, taken = Receiver(), folder / "secret", folder / "taken"
    secret.write_text("correct horse battery staple\n")
    secret.chmod(0o600)
    script = folder / "script"
    script.write_text(f"#!/bin/sh\ncat >>{taken}\necho >>{taken}\n")
    script.chmod(0o755)
    config = folder / "coordinator.toml"
    config.write_text(f"""
[[hook]]
name = "web"
url = "{receiver.url}"
severity = "info"
secret_file = "{secret}"
[[hook]]
name = "script"
command = ["{script}"]
filter = "kind = condition"
""")
    cluster = Cluster(folder, {"data": MIB}, coordinator_args=("--config", config))
    try:
        messages = lambda: [json.loads(body)["message"] for _, body in receiver.got]
        eventually("the web server is told", lambda: any("protected from now on" in m for m in messages()))
        headers, body = receiver.got[0]
        mac = hmac.new(b"correct horse battery staple", body, "sha256").hexdigest()
        expect(headers["Afterimage-Signature"] == f"sha256={mac}", "the signature is wrong")
        expect(headers["Afterimage-Event-Id"] == json.loads(body)["id"], "the id is not the event's")
        receiver.status = 503
        cluster.target.stop()
        eventually("refused, and tried again", lambda: receiver.refusals >= 2)
        eventually("the script is told", lambda: taken.exists() and "target-unreachable" in taken.read_text())
        events = cluster.command("events", "--limit", "0")["events"]
        cluster.coordinator.kill()
        receiver.status = 200
        cluster.coordinator.start()
        eventually("told after the crash", lambda: any("target-unreachable" in m for m in messages()))
        numbers = [json.loads(body)["number"] for _, body in receiver.got]
        expect(sorted(numbers) == numbers, f"not in order: {numbers}")
        eventually("it answers", lambda: cluster.try_command("status"))
        after = cluster.command("events", "--limit", "0")["events"]
        # None is missing but those about the hook, of which it is not told.
        due = {e["number"] for e in after if e["kind"] != "hook" and min(numbers) <= e["number"] <= max(numbers)}
        expect(set(numbers) == due, f"told {numbers}, due {sorted(due)}")
        expect(events[:-8] == after[:len(events) - 8], "events from before the crash are gone")
        config.write_text('[[hook]]\nname = "web"\nurl = "nowhere"\n')
        cluster.coordinator.stop()
        cluster.coordinator.start()
        eventually("it does not start with a bad hook", lambda: not cluster.coordinator.alive())
        expect(cluster.coordinator.process.returncode == 2, f"exit code {cluster.coordinator.process.returncode}")
    finally:
        cluster.close()
        receiver.close()


class Policies:
    """One pair behind a relay."""

    def __init__(self, folder):
        port = free_port()
        self.relay = Relay(port)
        self.folder = folder
        self.cluster = Cluster(folder, {"data": SIZE}, stream_port=port, advertise=f"127.0.0.1:{self.relay.port}")
        self.handle = nbd.NBD()
        self.handle.connect_uri(self.cluster.uri("data"))

    def write(self, size, at=0):
        for offset in range(0, size, MIB):
            self.handle.pwrite(os.urandom(MIB), at + offset)
        self.handle.flush()

    def caught_up(self):
        status = self.cluster.status()
        return status["durable_seq"] is not None and status["durable_seq"] >= status["captured_seq"] - 1

    def bandwidth(self):
        """A bandwidth is kept; raised while the group runs, what waited goes at once."""
        policy = self.cluster.command("policy", "update", "gold", "--bandwidth", "1MiB")
        expect(policy["bandwidth_bytes_per_s"] == MIB and policy["version"] == 2, f"{policy}")
        time.sleep(0.5)
        before, begun = self.relay.carried, time.monotonic()
        self.write(8 * MIB)
        wrote = time.monotonic() - begun
        time.sleep(3)
        rate = (self.relay.carried - before) / (time.monotonic() - begun)
        print(f"    written in {wrote:.1f} s; {rate / MIB:.2f} MiB a second on the wire", flush=True)
        expect(wrote < 4, "hosts do not wait for the bandwidth")
        expect(0.4 * MIB < rate < 1.3 * MIB, f"{rate:.0f} bytes a second with 1 MiB allowed")
        self.cluster.command("policy", "update", "gold", "--bandwidth", "0")
        eventually("what waited is sent", self.caught_up, timeout=4)

    def hours(self):
        """Outside its hours a group sends nothing, says so, and loses nothing."""
        now = time.gmtime()
        minute = (now.tm_hour * 60 + now.tm_min + 720) % 1440
        closed = f"{minute // 60:02}:{minute % 60:02}-{(minute + 1) // 60 % 24:02}:{(minute + 1) % 60:02}"
        policy = self.cluster.command("policy", "update", "gold", "--hours", closed)
        expect(any("minutes" in text for text in policy["warnings"]), f"no warning of what cannot be kept: {policy}")
        eventually("the state tells it", lambda: "outside-hours" in self.kinds())
        time.sleep(0.5)
        before = self.relay.carried
        self.write(4 * MIB, 16 * MIB)
        time.sleep(2)
        expect(self.relay.carried - before < 65536, f"{self.relay.carried - before} bytes were sent")
        self.cluster.command("policy", "update", "gold", "--hours", "")
        eventually("it is sent", self.caught_up, timeout=20)
        eventually("it is told no more", lambda: "outside-hours" not in self.kinds())
        self.cluster.replica_is_source()
        error = refused(self.cluster, "policy", "update", "gold", "--hours", "mon 25:00-26:00")
        expect("policy.allowed_hours[0]" in error["message"], f"{error}")
        error = refused(self.cluster, "policy", "update", "gold", "--hours", closed, "--lease", "3s")
        expect("policy.allowed_hours" in error["message"], f"{error}")

    def kinds(self):
        return [condition["kind"] for condition in self.cluster.status()["conditions"]]

    def failover_does_not_wait(self):
        """Once the source is held, everything leaves at once."""
        self.cluster.command("policy", "update", "gold", "--bandwidth", "64KiB")
        self.write(4 * MIB)
        begun = time.monotonic()
        done = self.cluster.command("failover", "start", self.cluster.GROUP, "--to", "latest")
        took = time.monotonic() - begun
        expect(took < 15, f"the failover waited for its bandwidth: {took:.0f} s")
        there = next(u for u in done["result"]["view"]["exports"][0]["uris"] if u.startswith("nbd+unix"))
        here = run("sha256sum", self.folder / "data.img").split()[0]
        expect(digest(there) == here, f"what was written is not there: {done}")

    def exclusion(self):
        """An excluded disk is taken by no group, and no pattern excludes one that is replicated."""
        self.cluster.command("policy", "create", "lean", "--exclude", "swap*", "--exclude", "*/scratch-*")
        image = self.folder / "swap.img"
        with open(image, "wb") as out:
            out.truncate(MIB)
        create = ("group", "create", "web", "--policy", "lean", "--source", "source", "--target", "target")
        error = refused(self.cluster, *create, "--disk", f"swap0={image}")
        expect("swap*" in error["message"], f"{error}")
        self.cluster.command(*create, "--disk", f"data={image}")
        error = refused(self.cluster, "policy", "update", "lean", "--exclude", "dat*")
        expect("policy.excluded_disks" in error["message"] and "web" in error["message"], f"{error}")
        error = refused(self.cluster, "disk", "add", "web", "x", "--path", self.folder / "scratch-1")
        expect("scratch" in error["message"], f"{error}")
        self.cluster.command("policy", "create", "strict", "--exclude", "data")
        error = refused(self.cluster, "group", "update", "web", "--policy", "strict")
        expect("group.policy" in error["message"], f"{error}")
        self.cluster.command("group", "delete", "web")

    def audit(self):
        """What was done is in the audit log, with who did it; a log that was altered is found out."""
        records = self.cluster.command("audit", "list", "--filter", 'objects:"put policies/default/gold"')["records"]
        expect(len(records) >= 2 and records[0]["method"] == "Policies/CreatePolicy", f"{records}")
        expect(all(r["actor"] == "admin/local" and r["request_id"] for r in records), f"{records}")
        verdict = self.cluster.command("audit", "verify")
        expect(verdict["whole"] and verdict["last"] == verdict["records"], f"{verdict}")
        known = f"{verdict['last']}:{verdict['hash']}"
        self.cluster.command("policy", "create", "later")
        self.cluster.command("audit", "verify", "--expect", known)
        folder = self.folder / "coordinator/audit"
        log = next(folder.iterdir())
        whole = log.read_bytes()
        self.cluster.command("audit", "verify", "--dir", folder, "--expect", known)
        try:
            log.write_bytes(whole.replace(b"policies/default/gold", b"policies/default/g0ld", 1))
            error = refused(self.cluster, "audit", "verify")
            expect(error["exit_code"] == 1 and "altered" in error["message"], f"{error}")
            log.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
            error = refused(self.cluster, "audit", "verify")
            expect("missing" in error["message"], f"{error}")
        finally:
            log.write_bytes(whole)
        error = refused(self.cluster, "audit", "verify", "--expect", f"{verdict['last']}:{'0' * 64}")
        expect("expected" in error["message"], f"{error}")
        secrets = [token for token in os.environ.get("AFTERIMAGE_TOKEN", "").split()]
        expect(b"PRIVATE" not in whole and not any(s.encode() in whole for s in secrets), "a secret is in the log")

    def priority(self):
        """On a short link the group of the higher priority keeps its RPO, and the other one is not forgotten."""
        folder, cluster = self.folder, self.cluster
        cluster.command("policy", "create", "first", "--priority", "90", "--rpo", "500ms")
        cluster.command("policy", "create", "last", "--priority", "10", "--rpo", "500ms")
        handles = {}
        for name in ("first", "last"):
            image = folder / f"{name}.img"
            with open(image, "wb") as out:
                out.truncate(SIZE)
            cluster.command("group", "create", name, "--policy", name, "--source", "source", "--target", "target",
                            "--disk", f"data={image}")
        for name in ("first", "last"):
            eventually(f"{name} is protected", lambda n=name: self.state(n)["phase"] == "protected")
            handle = nbd.NBD()
            handle.connect_uri(next(u for u in self.state(name)["disks"][0]["uris"] if u.startswith("nbd+unix")))
            handles[name] = handle
        # The two connections share one link.
        self.relay.share(3 * MIB)
        end = time.monotonic() + 10
        written = {"first": 0, "last": 0}
        worst = {"first": [], "last": []}

        def load(name, rate):
            begun, block = time.monotonic(), os.urandom(256 * 1024)
            while time.monotonic() < end:
                handles[name].pwrite(os.urandom(64) + block[64:], written[name] % (32 * MIB))
                written[name] += len(block)
                time.sleep(max(0.0, written[name] / rate - (time.monotonic() - begun)))

        threads = [threading.Thread(target=load, args=(name, rate * MIB)) for name, rate in (("first", 2), ("last", 4))]
        for thread in threads:
            thread.start()
        time.sleep(4)
        while time.monotonic() < end:
            for name in worst:
                worst[name].append(self.state(name)["rpo"]["now_ms"])
            time.sleep(0.3)
        for thread in threads:
            thread.join()
        median = {name: sorted(values)[len(values) // 2] for name, values in worst.items()}
        print(f"    RPO on a link of 3 MiB/s for 6 MiB/s: first {median['first']:.0f} ms, last {median['last']:.0f} ms", flush=True)
        durable = self.state("last")["durable_seq"]
        expect(median["first"] * 2 < median["last"], f"the more important group is no better off: {worst}")
        self.relay.share(None)
        eventually("both are caught up", lambda: all(
            self.state(n)["durable_seq"] >= self.state(n)["captured_seq"] - 1 for n in worst))
        expect(durable > 1, "the other group sent nothing at all")
        for name in worst:
            handles[name].shutdown()
            cluster.command("group", "delete", name)

    def state(self, group):
        return self.cluster.command("status", group)["groups"][0]

    def close(self):
        self.cluster.close()
        self.relay.close()


def main():
    tests = Tests()
    with workspace("policies") as folder:
        policies = None

        def begin():
            nonlocal policies
            policies = Policies(folder)
        try:
            if tests.run("a pair behind a relay", begin):
                for name, step in (
                    ("a bandwidth is kept and changed online", policies.bandwidth),
                    ("hours are kept and changed online", policies.hours),
                    ("excluded disks are taken by no group", policies.exclusion),
                    ("the audit log is whole, and found out if it is not", policies.audit),
                    ("on a short link the more important group goes first", policies.priority),
                    ("a failover waits for no bandwidth", policies.failover_does_not_wait),
                ):
                    tests.run(name, step)
        finally:
            if policies:
                policies.close()
    with workspace("targets") as folder:
        targets.play(tests, folder)
    with workspace("hooks") as folder:
        tests.run("hooks are told, over refusals and a crash", hooks, folder)
    certificates.run(tests, workspace)
    keys.run_all(tests, workspace)
    tests.end()


if __name__ == "__main__":
    main()
