#!/usr/bin/python3
"""Certificates of short life: renewed by themselves while a pair replicates and people stay logged in; alarms where they
are not; what goes on beyond their end, and what does not."""

import base64
import json
import os
import subprocess
import threading
import time
import urllib.request

import nbd

import journal_reader

from cluster import AFTERIMAGE, MIB, Cluster, eventually, expect, free_port

LIFE = 10


def told(cluster, text):
    """Events with this in them."""
    return [e for e in cluster.command("events", "--limit", "0")["events"] if text in f"{e['kind']} {e['message']}"]


class Pair:
    """A pair, and people who join."""

    def __init__(self, folder, *coordinator_args):
        self.folder = folder
        self.metrics = free_port()
        self.cluster = Cluster(folder, {"data": 16 * MIB}, coordinator_args=(
            *coordinator_args, "--metrics", f"127.0.0.1:{self.metrics}"))
        self.anna = self.join("anna", "operator")

    def join(self, name, role):
        path = self.folder / f"{name}.json"
        token = self.cluster.command("token", "create", name, "--role", role)["token"]
        subprocess.run([AFTERIMAGE, "join", token, "--identity", path], check=True, stdout=subprocess.DEVNULL)
        return path

    def by(self, identity, *args):
        """A command of somebody: exit code, answer, error."""
        done = subprocess.run([str(AFTERIMAGE), *map(str, args), "--json", "--identity", str(identity)],
                              capture_output=True, timeout=60, check=False)
        lines = done.stderr.decode().strip().splitlines()
        return done.returncode, done.stdout, json.loads(lines[-1])["error"] if done.returncode else lines

    def proxies(self):
        return {p["proxy"]: p for p in self.cluster.command("proxies")["proxies"]}

    def write(self, text):
        """Writes at the source, past the coordinator."""
        handle = nbd.NBD()
        handle.connect_uri(f"nbd+unix:///{Cluster.GROUP}/data?socket={self.cluster.source_socket}")
        handle.pwrite(text.ljust(4096, b"."), 0)
        handle.flush()
        handle.shutdown()

    def close(self):
        self.cluster.close()


class Certificates(Pair):
    """One whose certificates last ten seconds."""

    def __init__(self, folder):
        super().__init__(folder, "--certificate-lifetime", f"{LIFE}s")

    def renewed(self):
        """Over two lives everybody goes on, and nobody is asked for anything."""
        before = self.proxies()
        bob = self.join("bob", "viewer")
        watch = subprocess.Popen([AFTERIMAGE, "watch", "--json", "--for", f"{2 * LIFE}s", "--identity", str(self.anna)],
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        handle = nbd.NBD()
        handle.connect_uri(self.cluster.uri("data"))
        worst, end, n = 0, time.monotonic() + 2 * LIFE + 2, 0
        while time.monotonic() < end:
            handle.pwrite(b"%08d" % n * 512, n % 4096 * 4096)
            n += 1
            time.sleep(0.02)
            if n % 25 == 0:
                code, out, error = self.by(self.anna, "status")
                expect(code == 0 and not error, f"anna is not let in: {error}")
                worst = max(worst, json.loads(out)["groups"][0]["rpo"]["now_ms"])
        handle.shutdown()
        out, error = watch.communicate(timeout=30)
        expect(watch.returncode == 0, f"the watch has ended: {error.decode()}")
        seconds = sum(json.loads(line)["type"] == "status" for line in out.splitlines())
        expect(seconds > 2 * LIFE - 6, f"the watch has seen {seconds} states in {2 * LIFE} s")
        after = self.proxies()
        for name in before:
            expect(after[name]["key_pin"] != before[name]["key_pin"], f"{name} has the key of before")
        expect(len(told(self.cluster, "certificate renewed")) >= 4, "fewer renewals than there should have been")
        for alarm in ("not connected any more", "disconnected", "is not renewed"):
            expect(not told(self.cluster, alarm), f"{told(self.cluster, alarm)}")
        print(f"    {n} writes, RPO at most {worst:.0f} ms", flush=True)
        expect(worst < 1500, f"the RPO has been {worst:.0f} ms")
        # Bob has not come again.
        overdue = [e for e in told(self.cluster, "certificate of viewer/bob") if e["severity"] == "warning"]
        expect(overdue and "certificates/viewer/bob" in overdue[0]["subject"], f"no alarm: {overdue}")
        expect(not told(self.cluster, "certificate of operator/anna"), "an alarm for who has renewed")
        code, _, error = self.by(bob, "status")
        expect(code == 3 and "viewer/bob ended at" in error["message"], f"{code} {error}")
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        line = next(l for l in text.splitlines() if l.startswith("afterimage_certificate_expire") and '"anna"' in l)
        expect(0 < float(line.split()[-1]) - time.time() <= LIFE + 1, f"{line}")

    def expired(self):
        """Without a coordinator certificates end: the pair goes on by its pinned keys, and says so; then all is mended."""
        cluster = self.cluster
        cluster.coordinator.stop()
        time.sleep(LIFE + 2)
        cluster.target.kill()
        cluster.target.start()
        said = lambda p, text: text in p.log.read_text(errors="replace")  # noqa: E731
        eventually("the target takes the expired source", lambda: said(cluster.target, "it is taken for 89 days more"))
        eventually("the source takes the expired target", lambda: said(cluster.source, "it is taken for 89 days more"))
        self.write(b"written by expired certificates")
        cluster.coordinator.start()
        code, _, error = 0, None, None

        def answered():
            nonlocal code, error
            code, _, error = self.by(self.anna, "status")
            return code != 4
        eventually("the coordinator answers", answered)
        expect(code == 3 and "operator/anna ended at" in error["message"], f"{code} {error}")
        expect("token create" in error["hint"], f"{error}")
        eventually("the admin's identity is good", lambda: cluster.try_command("status"))
        eventually("both proxies are connected again", cluster.proxies_connected)
        eventually("nothing is overdue any more", lambda: not any(
            c["kind"].startswith("certificate") for p in self.proxies().values() for c in p["conditions"]))
        expect(told(cluster, "it is taken for 89 days more"), "no alarm has come")
        cluster.replica_is_source()


class Authorities(Pair):
    """One whose authority is replaced."""

    def rotate(self):
        """While hosts write; people who renew are let in all the time, and who does not is locked out only by force."""
        cluster, command = self.cluster, self.cluster.command
        bob, carol = self.join("bob", "viewer"), self.join("carol", "viewer")
        before = command("ca", "status")
        expect(not before["rotating"] and len(before["authorities"]) == 1, f"{before}")
        old = before["authorities"][0]["id"]
        code, _, error = self.by(self.anna, "ca", "rotate")
        expect(code == 3, "an operator rotates")
        over, errors, written = threading.Event(), [], [0]

        def writes():
            try:
                handle = nbd.NBD()
                handle.connect_uri(f"nbd+unix:///{Cluster.GROUP}/data?socket={cluster.source_socket}")
                while not over.is_set():
                    handle.pwrite(b"%08d" % written[0] * 512, written[0] % 4096 * 4096)
                    written[0] += 1
                    time.sleep(0.01)
                handle.shutdown()
            except Exception as error:  # noqa: BLE001
                errors.append(error)
        writer = threading.Thread(target=writes)
        writer.start()
        try:
            begun = command("ca", "rotate")
            new = begun["authorities"][0]["id"]
            expect(begun["rotating"] and new != old and begun["authorities"][1]["id"] == old, f"{begun}")
            _, _, error = self.by(cluster.identity, "ca", "rotate")
            expect("being replaced already" in error["message"], f"{error}")
            left = lambda: {c["name"] for c in command("ca", "status")["needed_by"]}  # noqa: E731
            eventually("proxies and the local admin have renewed", lambda: left() == {"anna", "bob", "carol"})
            for who in (self.anna, bob):
                code, _, error = self.by(who, "status")
                expect(code == 0, f"{error}")
            expect(left() == {"carol"}, f"{left()}")
            dora = self.join("dora", "viewer")
            # A crash in the middle of it.
            cluster.coordinator.kill()
            cluster.coordinator.start()
            eventually("both proxies are connected", lambda: cluster.try_command("proxies") and cluster.proxies_connected())
            for who in (self.anna, bob, dora):
                code, _, error = self.by(who, "status")
                expect(code == 0, f"{error}")
            _, _, error = self.by(cluster.identity, "ca", "rotate", "--finish")
            expect("viewer/carol" in error["message"] and "--anyway" in error["message"], f"{error}")
            command("certificate", "revoke", "carol")
            ended = command("ca", "rotate", "--finish")
            expect(not ended["rotating"] and [a["id"] for a in ended["authorities"]] == [new], f"{ended}")
            eventually("the admin's identity is good", lambda: cluster.try_command("status"))
            for who in (self.anna, bob, dora):
                code, _, error = self.by(who, "status")
                expect(code == 0, f"{error}")
            code, _, error = self.by(carol, "status")
            expect(code != 0, "who has a certificate of the old authority is let in")
            for process in (cluster.target, cluster.source):
                bundle = json.loads((self.folder / f"{process.name}-state/identity.json").read_text())
                expect(bundle["ca_pem"] == ended["authorities"][0]["certificate_pem"], f"{process.name} trusts the old one")
        finally:
            over.set()
            writer.join()
        expect(not errors and written[0] > 20, f"{errors} {written}")
        for alarm in ("disconnected", "is not renewed", "is refused"):
            expect(not told(cluster, alarm), f"{told(cluster, alarm)}")
        # What both ends have now is good for a stream from the start.
        for process in (cluster.target, cluster.source):
            process.stop()
            process.start()
        cluster.coordinator.stop()
        cluster.coordinator.start()
        eventually("it answers", lambda: cluster.try_command("status"))
        eventually("both proxies are connected again", cluster.proxies_connected)
        cluster.replica_is_source()
        # And once more, from an authority that is in the store.
        third = command("ca", "rotate")["authorities"]
        expect([a["id"] for a in third][1:] == [new], f"{third}")
        eventually("everybody but people has renewed", lambda: left() == {"anna", "bob", "dora"})
        command("ca", "rotate", "--finish", "--anyway")
        code, _, error = self.by(bob, "status")
        expect(code != 0, "who has a certificate of the old authority is let in")
        eventually("both proxies are connected again", cluster.proxies_connected)
        cluster.replica_is_source()


def encodings(secret):
    """A secret as it may stand in a file: raw, in hex, in base64 at any of its three places."""
    yield "raw", secret
    yield "hex", secret.hex().encode()
    yield "HEX", secret.hex().upper().encode()
    for shift in range(3):
        whole = base64.b64encode(b"\0" * shift + secret)
        # Without the ends, which depend on what stands beside it.
        part = whole[4 if shift else 0:-4]
        yield f"base64 at {shift}", part
        yield f"base64url at {shift}", part.replace(b"+", b"-").replace(b"/", b"_")


class Secrets(Pair):
    """One that logs all that it can, and whose secrets are known to the test."""

    #: Where secrets belong.
    HOMES = {"keys.bin", "ca.pem", "admin.json", "identity.json", "site.key", "recovery-key"}

    def secrets(self):
        """Everything that nobody else is to know, by name."""
        found = {"keys.bin": (self.folder / "coordinator/keys.bin").read_bytes()}
        for proxy in ("source", "target"):
            state = self.folder / f"{proxy}-state"
            found[f"key file of the {proxy}"] = (state / "site.key").read_bytes()
            found[f"site key of the {proxy}"] = journal_reader.site_key(state)
            keys = journal_reader.state_keys(state)
            expect(len(keys) == (2 if proxy == "target" else 1), f"{len(keys)} policy keys in what the {proxy} is told")
            found |= {f"policy key {ident} of the {proxy}": key for ident, key in keys.items()}
        found["recovery key"] = journal_reader.recovery_key((self.folder / "recovery-key").read_text())
        for path in self.folder.rglob("*.json"):
            if path.name in self.HOMES or path.name in ("anna.json", "bob.json"):
                found[f"key in {path.relative_to(self.folder)}"] = self.scalar(json.loads(path.read_text())["key_pem"])
        found["key of the CA"] = self.scalar((self.folder / "coordinator/ca.pem").read_text())
        return found

    @staticmethod
    def scalar(pem):
        """The private number of a P-256 key in PKCS#8."""
        der = base64.b64decode("".join(pem.split("-----BEGIN PRIVATE KEY-----")[1].split("-----END")[0].split()))
        return der[der.index(b"\x04\x20") + 2:][:32]

    def nowhere(self):
        """No secret in a log, the store, events, the audit log, journals or any answer: in no encoding."""
        cluster, command = self.cluster, self.cluster.command
        tokens = [command("token", "create", name, "--role", "viewer")["token"] for name in ("spent", "kept")]
        subprocess.run([AFTERIMAGE, "join", tokens[0], "--identity", self.folder / "bob.json"], check=True,
                       stdout=subprocess.DEVNULL)
        self.write(b"something to journal")
        cluster.settle()
        command("failover", "start", Cluster.GROUP, "--to", "latest", "--dry-run")
        command("ca", "rotate")
        made = command("key", "recovery", "--out", str(self.folder / "recovery-key"))
        # One that is not taken over yet, and one that is: the source is told of the first only.
        cluster.source.kill()
        command("key", "rotate", Cluster.GROUP)
        eventually("the target has the next key", lambda: len(journal_reader.state_keys(self.folder / "target-state")) == 2)
        answers = [command(*words.split()) for words in (
            "status", "proxies", "policy list", "group list", "disk list", "certificate list", "ca status",
            "audit list --limit 0", "audit verify", "events --limit 0", "failover list", "version", "rpo", "key list")]
        answers.append(made)
        answers.append(command("key", "rewrap"))
        answers.append(command("coordinator", "backup", str(self.folder / "backup")))
        secrets = self.secrets()
        for number, token in enumerate(tokens):
            fields = json.loads(base64.urlsafe_b64decode(token.removeprefix("aij1_") + "=="))
            secrets[f"token {number}"] = base64.urlsafe_b64decode(fields["s"] + "=")
        for process in cluster.processes:
            process.stop()
        # Files of a journal are made longer than what is in them.
        places = {str(path.relative_to(self.folder)): path.read_bytes().rstrip(b"\0") for path in self.folder.rglob("*")
                  if path.is_file() and path.name not in self.HOMES and path.name not in ("anna.json", "bob.json")}
        places["an answer"] = json.dumps(answers).encode()
        expect({"coordinator.log", "source.log", "coordinator/state.redb", "backup"} <= set(places), f"{sorted(places)}")
        expect(len(secrets) >= 8 and all(len(s) == 32 for s in secrets.values()), f"{[(k, len(v)) for k, v in secrets.items()]}")
        expect(b"DEBUG" in places["source.log"], "the log is not of all that can be logged")
        found = [f"{name} ({how}) in {place}" for name, secret in secrets.items() for how, text in encodings(secret)
                 for place, content in places.items() if text in content]
        expect(not found, "\n".join(found))
        # The search finds what is there.
        planted = {**places, "x": b"..." + base64.b64encode(b"ab" + secrets["keys.bin"] + b"c")}
        expect(any(text in planted["x"] for _, text in encodings(secrets["keys.bin"])), "the search finds nothing")
        print(f"    {len(secrets)} secrets looked for in {len(places)} files of {sum(map(len, places.values())) >> 10} KiB", flush=True)


class Revoked(Pair):
    """One of which some are not to be let in any more."""

    def person(self):
        """What an operator has open ends, and nothing is begun; not after a crash of the coordinator either."""
        cluster = self.cluster
        token = cluster.command("token", "create", "anna", "--role", "operator")["token"]
        watch = subprocess.Popen([AFTERIMAGE, "watch", "--json", "--identity", str(self.anna)],
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        watch.stdout.readline()
        serial = next(c["serial"] for c in self.certificates() if c["name"] == "anna")
        done = cluster.command("certificate", "revoke", "operator/anna", "--reason", "has left")["revoked"]
        expect([c["serial"] for c in done] == [serial] and done[0]["revoked"]["by"] == "admin/local", f"{done}")
        begun = time.monotonic()
        _, error = watch.communicate(timeout=20)
        expect(watch.returncode != 0 and time.monotonic() - begun < 5, f"the watch goes on: {error.decode()}")
        again = cluster.command("certificate", "revoke", "operator/anna")["revoked"]
        expect(again == done, f"revoked twice: {again}")

        def refused():
            code, _, error = self.by(self.anna, "status")
            expect(code == 3 and "operator/anna was revoked at" in error["message"], f"{code} {error}")
        refused()
        done = subprocess.run([AFTERIMAGE, "join", token, "--identity", self.folder / "again.json"],
                              capture_output=True, check=False)
        expect(done.returncode == 3, "a token of before lets her in")
        cluster.coordinator.kill()
        cluster.coordinator.start()
        eventually("the coordinator answers", lambda: cluster.try_command("status"))
        refused()
        records = cluster.command("audit", "list", "--filter", f'objects:"put certificates/default/{serial}"')["records"]
        expect([r["actor"] for r in records if r["method"] == "Certificates/RevokeCertificates"] == ["admin/local"],
               f"{records}")
        denied = cluster.command("audit", "list", "--filter", 'outcome:"was revoked"')["records"]
        expect(denied and len(denied) < 4, f"{denied}")
        ann = self.join("ann", "admin")
        code, _, error = self.by(ann, "certificate", "revoke", "ann", "--yes")
        expect(code == 3 and "who asks" in error["message"], f"{code} {error}")
        self.anna = self.join("anna2", "viewer")
        code, _, error = self.by(self.anna, "certificate", "revoke", "ann", "--yes")
        expect(code == 3, "a viewer revokes")

    def certificates(self):
        return self.cluster.command("certificate", "list")["certificates"]

    def proxy(self):
        """A source whose certificate is revoked loses its session and its stream, and gets neither again; it serves on."""
        cluster, pair = self.cluster, {"source", "target"}
        eventually("both proxies are connected again", cluster.proxies_connected)
        cluster.settle()
        cluster.command("certificate", "revoke", "proxy/source", "--reason", "stolen")
        connected = lambda: {p["proxy"] for p in self.cluster.command("proxies")["proxies"] if p["connected"]}  # noqa: E731
        eventually("the session has ended", lambda: connected() == pair - {"source"})
        said = lambda p, text: text in p.log.read_text(errors="replace")  # noqa: E731
        eventually("the target ends the stream", lambda: said(cluster.target, "of the other end was revoked"))
        eventually("the source is not let in", lambda: said(cluster.source, "was revoked"))
        eventually("the target refuses it", lambda: said(cluster.target, "a stream from"))
        self.write(b"written by who is revoked")
        # Neither end forgets it, without the coordinator.
        cluster.coordinator.stop()
        refusals = cluster.target.log.read_text(errors="replace").count("a stream from")
        for process in (cluster.target, cluster.source):
            process.kill()
            process.start()
        eventually("it is refused again", lambda: cluster.target.log.read_text(errors="replace").count("a stream from") > refusals)
        self.write(b"written by who is revoked, again")
        cluster.coordinator.start()
        eventually("the target is back", lambda: cluster.try_command("proxies") and connected() == pair - {"source"})
        status = cluster.status()
        expect(any(c["kind"] == "source-unreachable" for c in status["conditions"]), f"{status['conditions']}")
        # It is let in anew, with a new key.
        cluster.source.stop()
        (self.folder / "source-state/identity.json").unlink()
        cluster.source.env["AFTERIMAGE_TOKEN"] = cluster.command("token", "create", "source", "--role", "proxy")["token"]
        cluster.source.start()
        eventually("both proxies are connected", cluster.proxies_connected)
        eventually("the group is protected", cluster.protected)
        cluster.replica_is_source()
        states = [(c["newest"], bool(c["revoked"])) for c in self.certificates() if c["name"] == "source"]
        expect(sorted(states) == [(False, True), (True, False)], f"{states}")


def main():
    from cluster import Tests, workspace
    tests = Tests()
    run(tests, workspace)
    tests.end()


def run(tests, workspace):
    """All of them, on pairs of their own."""
    with workspace("certificates") as folder:
        pair = None

        def begin():
            nonlocal pair
            pair = Certificates(folder)
        try:
            if tests.run("a pair with certificates of ten seconds", begin):
                tests.run("certificates are renewed beside everything else", pair.renewed)
                tests.run("what goes on with expired certificates, and what does not", pair.expired)
        finally:
            if pair:
                pair.close()
    with workspace("authorities") as folder:
        pair = None

        def begin_anew():
            nonlocal pair
            pair = Authorities(folder)
        try:
            if tests.run("a pair whose authority is to be replaced", begin_anew):
                tests.run("the authority is replaced while everything goes on", pair.rotate)
        finally:
            if pair:
                pair.close()
    with workspace("secrets") as folder:
        pair = None
        level = os.environ.get("AFTERIMAGE_LOG")
        os.environ["AFTERIMAGE_LOG"] = "debug"

        def begin_loudly():
            nonlocal pair
            pair = Secrets(folder)
        try:
            if tests.run("a pair that logs all that it can", begin_loudly):
                tests.run("no secret is anywhere but where it belongs", pair.nowhere)
        finally:
            os.environ.pop("AFTERIMAGE_LOG")
            if level is not None:
                os.environ["AFTERIMAGE_LOG"] = level
            if pair:
                pair.close()
    with workspace("revoked") as folder:
        pair = None

        def begin_again():
            nonlocal pair
            pair = Revoked(folder)
        try:
            if tests.run("a pair of which some are not wanted any more", begin_again):
                tests.run("a person whose certificate is revoked is out", pair.person)
                tests.run("a proxy whose certificate is revoked is out", pair.proxy)
        finally:
            if pair:
                pair.close()


if __name__ == "__main__":
    main()
