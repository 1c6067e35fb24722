#!/usr/bin/python3
"""Keys of policies on real processes: rotated under writes, wrapped by a file and by a command, kept at the target's
site, opened by the recovery key alone, and taken over from an earlier version's files.

Needs nbdcopy (libnbd-bin), python3-libnbd, python3-cryptography.
"""

import json
import os
import pathlib
import shutil
import subprocess
import threading
import time

import nbd

import journal_reader
from cluster import AFTERIMAGE, MIB, Cluster, Tests, digest, eventually, expect, run
from cluster import workspace as cluster_workspace

SIZE = 16 * MIB
KMS = """#!/bin/sh
# A KMS: it holds its key itself, and may be down.
[ -e {folder}/kms-down ] && {{ echo the vault is sealed >&2; exit 7; }}
case $1 in
wrap) printf KMS1; openssl enc -aes-256-ctr -K {key} -iv 00000000000000000000000000000001 ;;
unwrap) tail -c +5 | openssl enc -d -aes-256-ctr -K {key} -iv 00000000000000000000000000000001 ;;
esac
"""


def refused(*args, **options):
    """A command that does not succeed; what it says."""
    done = subprocess.run([str(AFTERIMAGE), *map(str, args)], capture_output=True, timeout=60, check=False, **options)
    expect(done.returncode != 0, f"{args} succeeds: {done.stdout}")
    return done.stderr.decode()


class Keys:
    def __init__(self, folder):
        self.folder = folder
        self.config = folder / "coordinator.toml"
        self.config.write_text("")
        self.cluster = Cluster(folder, {"data": SIZE}, coordinator_args=("--config", self.config))
        self.kms = folder / "kms"
        self.kms.write_text(KMS.format(folder=folder, key="ab" * 32))
        self.kms.chmod(0o700)

    def keys(self):
        return self.cluster.command("key", "list")["groups"][0]

    def stream(self):
        [stream] = (self.folder / "journal" / "streams").iterdir()
        return stream

    def handle(self):
        handle = nbd.NBD()
        handle.connect_uri(f"nbd+unix:///{Cluster.GROUP}/data?socket={self.cluster.source_socket}")
        return handle

    def write(self, byte, at, length=65536):
        handle = self.handle()
        handle.pwrite(bytes([byte]) * length, at)
        handle.flush()
        handle.shutdown()

    def again(self, process):
        process.stop()
        process.start()

    def segment_keys(self):
        """Ids of the policy keys that heads of segments name."""
        heads = [path.read_bytes()[128:144] for path in self.stream().glob("segments/*.seg")]
        return {bytes(head).hex() for head in heads if any(head)}

    def rotated(self):
        """A key is rotated under writes: nothing is sent again, no client notices, and all points open."""
        cluster = self.cluster
        self.write(0x11, 0)
        before = cluster.settle()
        first = self.keys()
        expect(first["key"] == first["written_under"] and len(first["versions"]) == 1, f"{first}")
        written, stop, worst = [], threading.Event(), [0.0]

        def writer():
            handle = self.handle()
            while not stop.is_set():
                n, begun = len(written), time.monotonic()
                handle.pwrite(b"%08d" % n * 512, MIB + n % 2048 * 4096)
                worst[0] = max(worst[0], time.monotonic() - begun)
                written.append(n)
                time.sleep(0.01)
            handle.flush()
            handle.shutdown()
        thread = threading.Thread(target=writer)
        thread.start()
        try:
            seen = {first["key"]}
            for _ in range(3):
                cluster.command("key", "rotate", Cluster.GROUP)
                new = eventually("the source writes under the next key", lambda: (
                    lambda k: k if k["written_under"] not in seen and k["written_under"] == k["key"] else None)(self.keys()))
                seen.add(new["key"])
                expect(new["next_key"] is None, f"{new}")
        finally:
            stop.set()
            thread.join()
        expect(len(seen) == 4, f"{seen}")
        events = cluster.command("events", "--limit", "0")["events"]
        resyncs = [e for e in events if e["kind"] == "resync" and "begins" in e["message"]]
        expect(len(resyncs) == 1, f"more than the first synchronisation: {resyncs}")
        print(f"    {len(written)} writes over three rotations, the slowest {worst[0] * 1000:.0f} ms", flush=True)
        cluster.replica_is_source()
        under = {key.replace("-", "") for key in seen}
        expect(self.segment_keys() <= under and len(self.segment_keys()) >= 2, f"{self.segment_keys()} of {under}")
        # After a restart the target reads segments of all keys.
        cluster.target.kill()
        cluster.target.start()
        eventually("both are connected again", cluster.proxies_connected)
        eventually("the group is protected", cluster.protected)
        view = cluster.open_view("old", f"seq:{before}")
        handle = nbd.NBD()
        handle.connect_uri(view["data"])
        expect(handle.pread(8, MIB) == bytes(8), "what came later is in an older point")
        expect(handle.pread(65536, 0) == b"\x11" * 65536, "an older point has another content")
        handle.shutdown()
        cluster.close_view("old")
        cluster.replica_is_source()
        file = journal_reader.keys_file((self.stream() / "keys").read_bytes())
        expect({key[0] for key in file["keys"]} == seen, f"{file['keys']} are beside the journal, of {seen}")

    def waits(self):
        """While the target is away its next key is not written under; a second rotation is refused and says why."""
        cluster = self.cluster
        before = self.keys()["key"]
        cluster.target.kill()
        eventually("the target is missed", lambda: not all(p["connected"] for p in cluster.command("proxies")["proxies"]))
        cluster.command("key", "rotate", Cluster.GROUP)
        error = refused("key", "rotate", Cluster.GROUP, "--identity", cluster.identity)
        expect("being rotated already" in error and '"target"' in error, error)
        time.sleep(1.5)
        now = self.keys()
        expect(now["key"] == before and now["next_key"], f"{now}")
        self.write(0x22, 2 * MIB)
        cluster.target.start()
        eventually("it is taken over", lambda: self.keys()["written_under"] == now["next_key"])
        cluster.replica_is_source()

    def wrapped(self):
        """Keys move under a command, and back under a file; what is wrong is refused by its field."""
        cluster = self.cluster
        config = lambda text: self.config.write_text(text)  # noqa: E731
        expect(cluster.command("key", "list")["wrapping"] == [], "a wrapping key in a new installation")
        self.config.write_text("[keys]\ncommand = ['kms']\n")
        cluster.coordinator.stop()
        error = refused("coordinator", "--config", self.config, "--data-dir", self.folder / "coordinator")
        expect('keys.command is "kms"; allowed: the absolute path' in error, error)
        key = self.folder / "kek"
        key.write_bytes(os.urandom(32))
        key.chmod(0o644)
        config(f"[keys]\nfile = '{key}'\n")
        error = refused("coordinator", "--config", self.config, "--data-dir", self.folder / "coordinator")
        expect(f"keys.file: {key} may be read by others (mode 0644)" in error, error)
        command = f"command = ['{self.kms}']\ntimeout_s = 5\n"
        config(f"[keys]\n{command}")
        cluster.coordinator.start()
        eventually("the coordinator answers", lambda: cluster.try_command("status"))
        (self.folder / "kms-down").touch()
        error = refused("key", "rewrap", "--identity", cluster.identity, "--yes")
        expect("the vault is sealed" in error, error)
        (self.folder / "kms-down").unlink()
        cluster.command("key", "rewrap", "--check")
        expect(cluster.command("key", "list")["wrapping"] == [], "a check has changed something")
        cluster.command("key", "rewrap")
        listed = cluster.command("key", "list")
        [wrapping] = listed["wrapping"]
        expect(wrapping["by"] == "command", f"{wrapping}")
        under = {v["wrapping_key"] for g in listed["groups"] for v in g["versions"]}
        expect(under == {wrapping["id"]}, f"{under} instead of {wrapping}")
        # Without the command nothing opens, whatever else is there.
        (self.folder / "kms-down").touch()
        cluster.coordinator.stop()
        error = refused("coordinator", "--config", self.config, "--data-dir", self.folder / "coordinator")
        expect(f"the wrapping key {wrapping['id']}, which a command has wrapped, does not open" in error, error)
        (self.folder / "kms-down").unlink()
        cluster.coordinator.start()
        eventually("both are connected", lambda: cluster.try_command("status") and cluster.proxies_connected())
        cluster.replica_is_source()
        # To a file, by way of what was before.
        key.chmod(0o600)
        config(f"[keys]\nfile = '{key}'\n[keys.previous]\n{command}")
        self.again(cluster.coordinator)
        eventually("the coordinator answers", lambda: cluster.try_command("status"))
        cluster.command("key", "rewrap")
        config(f"[keys]\nfile = '{key}'\n")
        (self.folder / "kms-down").touch()
        self.again(cluster.coordinator)
        eventually("both are connected", lambda: cluster.try_command("status") and cluster.proxies_connected())
        [last] = cluster.command("key", "list")["wrapping"]
        expect(last["by"] == "file" and last["id"] != wrapping["id"], f"{last}")
        cluster.replica_is_source()
        (self.folder / "kms-down").unlink()

    def earlier(self):
        """Files of an earlier version, with keys in plain and none beside the journal, are taken over at the next start."""
        cluster = self.cluster
        state, beside = self.folder / "target-state", self.stream() / "keys"
        cluster.settle()
        cluster.target.stop()
        keys = journal_reader.state_keys(state)
        kept = (state / "desired.pb").read_bytes()
        plain = unsealed(kept, keys)
        (state / "desired.pb").write_bytes(plain)
        for path in (state / "site.keys", state / "site.key", beside):
            path.unlink()
        cluster.coordinator.stop()
        cluster.target.start()
        eventually("keys are beside the journal", beside.exists)
        eventually("they lie in plain no more", lambda: b"".join(keys.values())[:32] not in (state / "desired.pb").read_bytes())
        expect(journal_reader.state_keys(state) == keys, "other keys")
        self.write(0x33, 3 * MIB)
        cluster.coordinator.start()
        eventually("both are connected", lambda: cluster.try_command("status") and cluster.proxies_connected())
        cluster.replica_is_source()

    def recovery(self):
        """The recovery key is shown once. With it, or with the key of the site, a journal opens with all else gone."""
        cluster = self.cluster
        out = self.folder / "recovery-key"
        error = refused("key", "recovery", "--json", "--identity", cluster.identity)
        expect("--out FILE" in error, error)
        text = run(AFTERIMAGE, "key", "recovery", "--identity", cluster.identity).decode()
        lost = journal_reader.recovery_key(text)
        error = refused("key", "recovery", "--identity", cluster.identity, "--out", out)
        expect("made already" in error and not out.exists(), error)
        made = cluster.command("key", "recovery", "--replace", "--out", str(out))
        expect(out.stat().st_mode & 0o777 == 0o600, "the file may be read by others")
        key = journal_reader.recovery_key(out.read_text())
        expect(key != lost and made["recovery_key_id"] == cluster.command("key", "list")["recovery_key_id"], f"{made}")
        named = lambda: journal_reader.keys_file((self.stream() / "keys").read_bytes())["recovery_key"]  # noqa: E731
        eventually("the target's keys are under it", lambda: named().replace("-", "") == made["recovery_key_id"])
        self.write(0x44, 4 * MIB)
        past = cluster.settle()
        self.write(0x55, 4 * MIB)
        cluster.settle()
        wanted = digest(cluster.uri("data"))
        cluster.close()
        before = journal_reader.open_keys(journal_reader.keys_file((self.stream() / "keys").read_bytes()), "recovery", key)
        expect(len(before) == len(journal_reader.state_keys(self.folder / "target-state")), f"{len(before)} keys open")
        # All that is left: a copy of the journal, and a piece of paper.
        copy = self.folder / "copy"
        shutil.copytree(self.folder / "journal", copy)
        listed = json.loads(run(AFTERIMAGE, "journal", "list", copy, "--recovery-key-file", out, "--json"))["journals"]
        expect(len(listed) == 1 and listed[0]["opens"] and listed[0]["group"] == Cluster.GROUP, f"{listed}")
        other = self.folder / "other"
        other.write_text(text)
        error = refused("journal", "serve", copy, "--recovery-key-file", other, "--views", f"unix:{self.folder}/r.sock")
        expect("do not open with this key" in error, error)
        other.write_text(out.read_text().replace("airk1-", "airk1-A"))
        error = refused("journal", "serve", copy, "--recovery-key-file", other, "--views", f"unix:{self.folder}/r.sock")
        expect("no recovery key" in error, error)
        with Served(self, copy, "--recovery-key-file", out) as disks:
            expect(digest(disks["data"]) == wanted, "the newest point is not what the source had")
        with Served(self, copy, "--recovery-key-file", out, "--to", f"seq:{past}", "--writable") as disks:
            handle = nbd.NBD()
            handle.connect_uri(disks["data"])
            expect(handle.pread(65536, 4 * MIB) == b"\x44" * 65536, "an older point has another content")
            handle.pwrite(b"\x66" * 4096, 4 * MIB)
            handle.flush()
            expect(handle.pread(4096, 4 * MIB) == b"\x66" * 4096, "what was written is not there")
            handle.shutdown()
        with Served(self, copy, "--recovery-key-file", out) as disks:
            expect(digest(disks["data"]) == wanted, "what was written to a view has changed the journal")
        with Served(self, copy, "--recovery-key-file", out, "--to", f"seq:{past}", "--writable") as disks:
            handle = nbd.NBD()
            handle.connect_uri(disks["data"])
            expect(handle.pread(4096, 4 * MIB) == b"\x66" * 4096, "what was written is not there the next time")
            handle.shutdown()
        # At the site: its own key, in the state of its proxy.
        with Served(self, self.folder / "journal", "--state", self.folder / "target-state") as disks:
            expect(digest(disks["data"]) == wanted, "the newest point is not what the source had")


class Served:
    """A journal by itself."""

    def __init__(self, keys, journal, *args):
        self.args = [str(AFTERIMAGE), "journal", "serve", str(journal), "--views", f"unix:{keys.folder}/rescue.sock", "--json",
                     *map(str, args)]
        self.log = keys.folder / "journal-serve.log"

    def __enter__(self):
        self.process = subprocess.Popen(self.args, stdout=subprocess.PIPE, stderr=self.log.open("ab"))
        line = self.process.stdout.readline()
        expect(line, f"{self.args}: {self.log.read_text()[-2000:]}")
        return {disk["disk"]: disk["uris"][0] for disk in json.loads(line)["disks"]}

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(timeout=30)


def field(number, value):
    def varint(n):
        out = b""
        while n > 127:
            out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def unsealed(state, keys):
    """A desired state as versions without a site key kept it: each policy key in plain, nothing about older ones."""
    def key(message):
        fields = list(journal_reader.protobuf(message))
        ident = next(value for number, value in fields if number == 1)
        return field(1, ident) + field(2, keys[ident.decode()]) + b"".join(
            field(3, key(value)) for number, value in fields if number == 3)

    def group(message):
        return b"".join(field(number, key(value) if number == 3 else value)
                        for number, value in journal_reader.protobuf(message))
    return b"".join(field(number, group(value) if number in (3, 4) else value)
                    for number, value in journal_reader.protobuf(state))


def run_all(tests, workspace):
    """All of it."""
    with workspace("keys") as folder:
        keys = Keys(pathlib.Path(folder))
        try:
            tests.run("keys: rotated under writes, without a synchronisation", keys.rotated)
            tests.run("keys: the target has the next key first", keys.waits)
            tests.run("keys: wrapped by a command, and by a file", keys.wrapped)
            tests.run("keys: files of an earlier version", keys.earlier)
            tests.run("keys: a journal opens by the recovery key alone, and by the site's", keys.recovery)
        finally:
            keys.cluster.close()


if __name__ == "__main__":
    alone = Tests()
    run_all(alone, cluster_workspace)
    alone.end()
