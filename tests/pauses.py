"""A group that is paused, on real processes: its hosts go on, nothing leaves its source, the target keeps what it has, all three
processes are replaced meanwhile, and afterwards what was written is sent once. It can be failed over to what the target
holds."""

import json
import random
import subprocess
import time

from cluster import AFTERIMAGE, MIB, Cluster, Failed, digest, eventually, expect, free_port
from continuity import BLOCK, protected_again
from scene import Relay, connected

SIZE = 64 * MIB
PIECE = 64 * 1024
# Of what is sent, beside what was written.
ALLOWED = 1.05
# What a link carries that carries nothing: words of life, handshakes.
QUIET = 96 * 1024


def fill(uri, seed, pieces, offset=0):
    """Writes so many pieces that do not compress; the longest that one write took, seconds."""
    handle = connected(uri)
    rng = random.Random(seed)
    longest = 0.0
    for number in range(pieces):
        begun = time.monotonic()
        handle.pwrite(rng.randbytes(PIECE), (offset + number) * PIECE)
        longest = max(longest, time.monotonic() - begun)
    handle.flush()
    handle.shutdown()
    return longest


class Paused:
    """A pair behind a relay on its stream, with something in it."""

    def __init__(self, folder, **options):
        port = free_port()
        self.stream = Relay(port)
        self.cluster = Cluster(folder, {"data": SIZE}, stream_port=port, advertise=f"127.0.0.1:{self.stream.port}", **options)
        fill(self.cluster.uri("data"), 1, 200)
        self.before = self.cluster.settle()
        self.held = digest(self.cluster.uri("data"))

    def pause(self):
        made = self.cluster.command("group", "pause", Cluster.GROUP, "--reason", "new switch")
        expect(made["pause"]["confirmed"] and made["pause"]["reason"] == "new switch", json.dumps(made))
        # What had been written to the socket before is on its way still.
        time.sleep(0.5)
        return self.stream.carried

    def is_paused(self):
        try:
            pause = self.cluster.status()["pause"]
        except (Failed, TypeError):
            return None
        return pause and pause["confirmed"]

    def shows(self, seq, wanted, what):
        view = self.cluster.open_view("shown", f"seq:{seq}")
        try:
            expect(digest(view["data"]) == wanted, what)
        finally:
            self.cluster.close_view("shown")

    def quiet_since(self, carried, what):
        sent = self.stream.carried - carried
        expect(sent <= QUIET, f"{what}: {sent} bytes left a source that is paused")

    def resume(self, carried, written, more=0):
        """What was written is sent, once."""
        self.cluster.command("group", "resume", Cluster.GROUP)
        eventually("the group is protected again", lambda: protected_again(self.cluster), timeout=90)
        self.cluster.settle()
        sent = self.stream.carried - carried
        print(f"    {sent} bytes sent after a pause in which {written} were written", flush=True)
        expect(sent <= ALLOWED * written + more + QUIET, f"{sent} bytes were sent for {written}")
        self.cluster.replica_is_source()

    def close(self):
        self.cluster.close()
        self.stream.close()


def goes_on(folder):
    """Hosts do not notice; the RPO is told and alarms nobody; what the target holds does not age."""
    pair = Paused(folder, retention="3s")
    cluster = pair.cluster
    try:
        cluster.command("policy", "update", "gold", "--rpo", "500ms", "--warn-after", "500ms")
        points = cluster.status()["points"]
        carried = pair.pause()
        newest = cluster.status()["points"]["newest"]["seq"]
        longest = fill(cluster.uri("data"), 2, 160, 300)
        expect(longest < 2, f"a write took {longest:.1f} s")
        # Longer than what is kept.
        time.sleep(6)
        status = cluster.status()
        pair.quiet_since(carried, "with hosts that write")
        expect(status["rpo"]["now_ms"] >= 6000, f"the RPO is {status['rpo']}")
        kinds = {condition["kind"]: condition["severity"] for condition in status["conditions"]}
        expect(kinds.pop("paused", None) == "info" and not kinds, f"{status['conditions']}")
        cluster.command("status", "--check")
        said = [event for event in cluster.command("events", "--limit", "1000")["events"]
                if event["severity"] != "info" and event["kind"] == "pause"]
        expect(len(said) == 1 and "new switch" in said[0]["message"], f"{said}")
        expect(status["points"]["newest"]["seq"] == newest, "points come while it is paused")
        expect(status["points"]["oldest"]["seq"] >= points["oldest"]["seq"], f"{status['points']}")
        pair.shows(newest, pair.held, "the newest point is not what it was")
        advice = cluster.command("failover", "advise", Cluster.GROUP)
        fits = {verb["verb"]: verb["fits"] for verb in advice["verbs"]}
        expect(advice["advice"]["verb"] is None and "group resume" in advice["advice"]["why"], json.dumps(advice))
        expect(fits == {"resume": True, "planned-failover": False, "failover": True}, f"{fits}")
        pair.resume(carried, 160 * PIECE)
        expect(cluster.status()["pause"] is None, "it is paused still")
    finally:
        pair.close()


def outlives(folder):
    """Source, target and coordinator are replaced while it is paused; no restore point of before is lost."""
    pair = Paused(folder)
    cluster = pair.cluster
    try:
        carried = pair.pause()
        fill(cluster.uri("data"), 2, 80, 300)
        for process in (cluster.source, cluster.target, cluster.coordinator):
            for end in (process.stop, process.kill):
                end()
                process.start()
                eventually("both proxies are back", lambda: cluster.try_command("status") and cluster.proxies_connected())
                eventually("it is paused still", pair.is_paused)
                fill(cluster.uri("data"), 3, 4, 400)
                pair.quiet_since(carried, f"after the {process.name} has ended by {end.__name__}")
                # Handshakes are bytes, too.
                carried = max(carried, pair.stream.carried - QUIET // 4)
        pair.shows(pair.before, pair.held, "a point of before is not what it was")
        # The source was killed once: what it had in memory is compared by hash first.
        pair.resume(carried, (80 + 6 * 4) * PIECE, MIB // 2)
        pair.shows(pair.before, pair.held, "a point of before is lost")
    finally:
        pair.close()


def failed_over(folder):
    """A planned failover is refused; another goes to what the target holds, and ends the pause; undone, what was written
    meanwhile is there."""
    pair = Paused(folder)
    cluster = pair.cluster
    try:
        carried = pair.pause()
        fill(cluster.uri("data"), 2, 40, 300)
        wanted = digest(cluster.uri("data"))
        done = subprocess.run([AFTERIMAGE, "failover", "planned", Cluster.GROUP, "--json", "--yes", "--identity",
                               cluster.identity], capture_output=True, timeout=60, check=False)
        expect(done.returncode == 3 and b"paused" in done.stderr, f"{done.returncode}: {done.stderr}")
        over = cluster.command("failover", "start", Cluster.GROUP, "--to", "latest")
        expect(over["state"] == "done" and over["result"]["fence"] == "confirmed", json.dumps(over, indent=1))
        [export] = over["result"]["view"]["exports"]
        replica = next(uri for uri in export["uris"] if uri.startswith("nbd+unix"))
        expect(digest(replica) == pair.held, "the replica is not what the target held")
        pair.quiet_since(carried, "by a failover")
        expect(cluster.status()["pause"] is None, "what is failed over is paused")
        # The comparison has just let go of it.
        eventually("the failover is undone", lambda: cluster.try_command("failover", "undo", Cluster.GROUP))
        eventually("the group is protected again", lambda: protected_again(cluster), timeout=60)
        expect(digest(cluster.uri("data")) == wanted, "the source has lost what it had")
        cluster.replica_is_source()
        handle = connected(cluster.uri("data"))
        handle.pwrite(bytes(BLOCK), 0)
        handle.shutdown()
        cluster.settle()
    finally:
        pair.close()
