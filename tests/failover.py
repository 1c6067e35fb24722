#!/usr/bin/python3
"""There and back, with real processes: a failover that is undone, one that is planned, a point that is changed. What is
sent after each is what is different, and nothing that a host was answered is missing where it should be.

Needs libnbd-bin, python3-libnbd.
"""

import json
import random
import subprocess
import threading
import time

import nbd

from cluster import AFTERIMAGE, Cluster, MIB, Tests, digest, eventually, expect, workspace

SIZE = 64 * MIB
BLOCK = 64 * 1024
# Of what is sent again, beside the blocks themselves: records, seals, cuts, hashes.
ALLOWED = 1.05
# Hashes of what may differ after the source was killed, and cuts while it waited. All of the disk would be 25 MiB.
HASHES = MIB // 2


def fill(uri, seed, blocks, offset=0):
    """Writes so many blocks that do not compress, from a block on; flushed."""
    handle = nbd.NBD()
    handle.connect_uri(uri)
    rng = random.Random(seed)
    for number in range(blocks):
        handle.pwrite(rng.randbytes(BLOCK), (offset + number) * BLOCK)
    handle.flush()
    handle.shutdown()


def block(uri, number):
    handle = nbd.NBD()
    handle.connect_uri(uri)
    found = bytes(handle.pread(BLOCK, number * BLOCK))
    handle.shutdown()
    return found


def refused(cluster, *args, code=3):
    """A command that must be refused; what it says."""
    done = subprocess.run([AFTERIMAGE, *args, "--json", "--yes", "--identity", cluster.identity], capture_output=True,
                          timeout=60, check=False)
    expect(done.returncode == code, f"{args}: exit code {done.returncode}\n{done.stdout.decode()}{done.stderr.decode()}")
    return json.loads(done.stdout or done.stderr)


def view_uri(operation, disk="data"):
    [export] = [e for e in operation["result"]["view"]["exports"] if e["disk"] == disk]
    return next(u for u in export["uris"] if u.startswith("nbd+unix"))


def wire_bytes(cluster):
    return cluster.status()["wire_bytes"]


def states(cluster):
    views = cluster.command("view", "list", cluster.GROUP)["views"]
    return {view["view"]: "open" if view["open"] else "kept" if view["kept"] else "closed" for view in views}


def undone(folder):
    """Failed over without its source, written to at both sides, and back: only the difference is sent, the source's
    content is the truth, and what was written at the target is kept."""
    cluster = Cluster(folder, {"data": SIZE})
    try:
        fill(cluster.uri("data"), 1, 400)
        cluster.settle()
        text = json.dumps(refused(cluster, "failover", "undo", cluster.GROUP))
        expect("not failed over" in text, text)
        cluster.source.kill()
        over = cluster.command("failover", "start", cluster.GROUP, "--to", "latest", "--unconfirmed", cluster.GROUP)
        replica = view_uri(over)
        fill(replica, 2, 40)
        kept = digest(replica)

        # A host that is there keeps it from being undone.
        handle = nbd.NBD()
        handle.connect_uri(replica)
        eventually("the target reports its host", lambda: "1 hosts" in try_refused(cluster))
        handle.shutdown()
        eventually("the host is gone", lambda: not try_refused(cluster))

        # The source comes back, is fenced, and answers nobody.
        cluster.source.start()
        eventually("the source is back", cluster.proxies_connected)
        held = HostWaits(cluster)
        undo = cluster.command("failover", "undo", cluster.GROUP)
        expect([s["step"] for s in undo["steps"]] == ["check", "leave-view", "return-generation", "release"], undo)
        eventually("the group is protected again", cluster.protected, timeout=60)
        held.join(30)
        expect(not held.is_alive() and held.error is None, f"the held write: {held.error}")
        expect(states(cluster) == {"failover": "kept"}, states(cluster))
        cluster.replica_is_source()
        once = wire_bytes(cluster)
        expect(once <= ALLOWED * BLOCK + HASHES, f"{once} bytes were sent for one block of {BLOCK}")
        expect(block(cluster.uri("data"), 0) == expected(1, 0), "the source has lost what it had")

        # Once more, beside what is kept; then back to what was kept, by a change of the point.
        over = cluster.command("failover", "start", cluster.GROUP, "--to", "latest")
        expect(over["result"]["view"]["view"] == "failover-2", over["result"]["view"])
        changed = cluster.command("failover", "change-point", cluster.GROUP, "--view", "failover")
        expect(digest(view_uri(changed)) == kept, "what was kept is not what had been written")
        expect(states(cluster) == {"failover": "open", "failover-2": "kept"}, states(cluster))
        text = json.dumps(refused(cluster, "failover", "change-point", cluster.GROUP, "--view", "failover", "--force", code=2))
        expect("failover-2" in text, text)
        eventually("no host is left", lambda: not try_refused(cluster))
        undo = cluster.command("failover", "undo", cluster.GROUP, "--discard")
        expect(undo["steps"][-1]["step"] == "discard" and undo["result"]["branch"] is None, undo)
        eventually("the group is protected again", cluster.protected, timeout=60)
        expect(states(cluster) == {"failover-2": "kept"}, states(cluster))
        cluster.command("view", "close", cluster.GROUP, "failover-2")
        expect(states(cluster) == {}, states(cluster))
        cluster.replica_is_source()
    finally:
        cluster.close()


def try_refused(cluster):
    """Why an undoing is refused now; empty if it is not."""
    done = subprocess.run([AFTERIMAGE, "failover", "undo", cluster.GROUP, "--dry-run", "--json", "--yes", "--identity",
                           cluster.identity], capture_output=True, timeout=60, check=False)
    return "" if done.returncode == 0 else (done.stdout + done.stderr).decode()


def expected(seed, number):
    rng = random.Random(seed)
    for _ in range(number):
        rng.randbytes(BLOCK)
    return rng.randbytes(BLOCK)


class HostWaits(threading.Thread):
    """A write at a source that is fenced: it must not be answered before the failover is undone."""

    def __init__(self, cluster):
        super().__init__(daemon=True)
        self.uri, self.error, self.answered = cluster.uri("data"), None, False
        self.start()
        time.sleep(1)
        expect(not self.answered, "a fenced source has answered a write")

    def run(self):
        try:
            while not self.answered:
                try:
                    fill(self.uri, 9, 1, offset=500)
                    self.answered = True
                except nbd.Error:
                    # It is turned away, or its connection ends with the generation: it comes again, as hosts do.
                    time.sleep(0.1)
        except Exception as error:  # noqa: BLE001
            self.error = error


def planned(folder):
    """Handed over under load: every answered write is in the replica; handed back by undoing, none of the source's is
    missing. A coordinator that is killed in the middle finishes it."""
    cluster = Cluster(folder, {"data": SIZE, "log": 16 * MIB})
    try:
        writer = Counting(cluster.uri("data"))
        eventually("it writes", lambda: writer.answered > 200)
        started = cluster.command("failover", "planned", cluster.GROUP, "--no-wait")
        cluster.coordinator.kill()
        cluster.coordinator.start()
        eventually("the coordinator is back", lambda: cluster.try_command("status"))
        over = cluster.command("failover", "wait", started["operation"])
        expect(over["state"] == "done" and over["verb"] == "planned-failover", over)
        answered = writer.answered
        writer.stop()
        expect(Counting.newest(view_uri(over)) >= answered, f"{answered} writes were answered, and "
               f"{Counting.newest(view_uri(over))} are there")
        text = json.dumps(refused(cluster, "failover", "planned", cluster.GROUP))
        expect("undo-failover" in text, text)

        # An older point, and what it lacks.
        point = over["result"]["point"]["seq"] - 50
        changed = cluster.command("failover", "change-point", cluster.GROUP, "--to", f"seq:{point}")
        expect(changed["result"]["point"]["seq"] == point, changed["result"]["point"])
        expect(Counting.newest(view_uri(changed)) < answered, "an older point shows the newest write")
        # Where there is no point the group runs on as it did.
        done = subprocess.run([AFTERIMAGE, "failover", "change-point", cluster.GROUP, "--to", "seq:99999999", "--json",
                               "--yes", "--identity", cluster.identity], capture_output=True, timeout=60, check=False)
        expect(done.returncode != 0, "a point that does not exist was opened")
        expect(states(cluster)["failover-2"] == "open", states(cluster))

        undo = cluster.command("failover", "undo", cluster.GROUP)
        expect(undo["state"] == "done", undo)
        eventually("the group is protected again", cluster.protected, timeout=60)
        expect(Counting.newest(cluster.uri("data")) >= answered, "the source has lost an answered write")
        cluster.replica_is_source()
        listed = [f["verb"] for f in cluster.command("failover", "list", cluster.GROUP)["failovers"]]
        expect(listed[:3] == ["undo-failover", "change-point", "planned-failover"], listed)
    finally:
        cluster.close()


class Counting:
    """Counts upwards in one block, durably."""

    def __init__(self, uri):
        self.uri, self.answered, self.ends = uri, 0, False
        self.thread = threading.Thread(target=self.write, daemon=True)
        self.thread.start()

    def write(self):
        handle = nbd.NBD()
        handle.connect_uri(self.uri)
        while not self.ends:
            try:
                handle.pwrite((self.answered + 1).to_bytes(8, "little") * 512, 0, nbd.CMD_FLAG_FUA)
            except nbd.Error:
                return
            self.answered += 1

    def stop(self):
        # The write that is held may be answered when the source goes on: nobody waits for it here.
        self.ends = True

    @staticmethod
    def newest(uri):
        return int.from_bytes(block(uri, 0)[:8], "little")


def beyond_reach(folder):
    """Without its target nothing of it can be undone; a source that cannot be asked is not handed over."""
    cluster = Cluster(folder, {"data": 8 * MIB})
    try:
        fill(cluster.uri("data"), 1, 4)
        cluster.settle()
        cluster.source.kill()
        eventually("the source is missed", lambda: not all(p["connected"] for p in cluster.command("status")["proxies"]))
        text = json.dumps(refused(cluster, "failover", "planned", cluster.GROUP))
        expect("cannot be reached" in text, text)
        cluster.command("failover", "start", cluster.GROUP, "--to", "latest", "--unconfirmed", cluster.GROUP)
        cluster.target.kill()
        eventually("the target is missed", lambda: not any(p["connected"] for p in cluster.command("status")["proxies"]))
        done = subprocess.run([AFTERIMAGE, "failover", "undo", cluster.GROUP, "--json", "--yes", "--identity",
                               cluster.identity], capture_output=True, timeout=60, check=False)
        expect(done.returncode == 4, f"exit code {done.returncode}: {done.stderr.decode()}")
        cluster.target.start()
        # The source stays away: it is told when it comes.
        eventually("the target is back", lambda: any(p["connected"] for p in cluster.command("status")["proxies"]))
        eventually("its failover can be undone", lambda: not try_refused(cluster))
        undo = cluster.command("failover", "undo", cluster.GROUP, "--discard")
        expect(undo["state"] == "done" and undo["steps"][3]["state"] == "skipped", undo["steps"])
        cluster.source.start()
        eventually("the group is protected again", cluster.protected, timeout=60)
        cluster.replica_is_source()
    finally:
        cluster.close()


def main():
    tests = Tests()
    for name, test in (("a failover that is undone sends only what differs, and keeps what was written", undone),
                       ("a planned failover under load loses nothing, also with its coordinator killed", planned),
                       ("a failover is undone without its source, and not without its target", beyond_reach)):
        with workspace("failover") as folder:
            tests.run(name, test, folder)
    tests.end()


if __name__ == "__main__":
    main()
