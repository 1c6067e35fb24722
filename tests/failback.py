#!/usr/bin/python3
"""Back to the source, with real processes that take both roles: what was written at the target comes along, only the
difference travels, and whatever is killed, one side runs and has all that a host was answered.

    tests/failback.py [ROUNDS [SEED]]      rounds of processes killed in the middle of a switch; 3 if not said

Needs libnbd-bin, python3-libnbd.
"""

import json
import random
import sys
import time

import nbd

from cluster import MIB, Cluster, Failed, Tests, digest, eventually, expect, free_port, workspace
from failover import ALLOWED, BLOCK, HASHES, Counting, block, expected, fill, refused, states, view_uri

SIZE = 64 * MIB
# Where the counting writer counts, and where a host writes: beside what the disk is filled with.
FILLED = 400


def both_roles(folder, **options):
    """A protected pair of which the source takes streams, too."""
    port = free_port()
    return Cluster(folder, {"data": SIZE}, source_args=("--journal", folder / "source-journal", "--listen",
                                                        f"127.0.0.1:{port}", "--views", f"unix:{folder}/back.sock"),
                   **options)


def lost(cluster):
    """The source is gone, and the group runs at its target; where that is."""
    cluster.source.kill()
    over = cluster.command("failover", "start", cluster.GROUP, "--to", "latest", "--unconfirmed", cluster.GROUP)
    return view_uri(over)


def returned(cluster):
    cluster.source.start()
    eventually("the source is back", cluster.proxies_connected)


def failback(cluster, *args, timeout=120):
    return cluster.command("failback", args[0], cluster.GROUP, *args[1:], timeout=timeout)


def state(cluster):
    return failback(cluster, "status")


def ready(cluster):
    return eventually("the failback is ready to switch",
                      lambda: (found := state(cluster))["reverse"] and found["reverse"]["ready"] and found["reverse"],
                      timeout=120)


def commit(cluster):
    """As soon as it may be."""
    def committed():
        return cluster.try_command("failback", "commit", cluster.GROUP)
    eventually("the failback is committed", committed, timeout=120, pause=0.5)
    eventually("the group is protected", cluster.protected, timeout=60)


def there_and_back(folder):
    """One connection writes to the view before, during and after the failback begins; the switch brings all of it; only what
    differs travels, there and after the switch."""
    cluster = both_roles(folder)
    try:
        fill(cluster.uri("data"), 1, FILLED)
        cluster.settle()
        text = json.dumps(refused(cluster, "failback", "start", cluster.GROUP))
        expect("not failed over" in text, text)
        replica = lost(cluster)
        fill(replica, 2, 40)
        host = nbd.NBD()
        host.connect_uri(replica)
        host.pwrite(b"before the failback".ljust(4096, b"."), FILLED * BLOCK)
        host.flush()
        returned(cluster)
        begun = failback(cluster, "start")
        expect([s["step"] for s in begun["steps"]] == ["check", "release-disks", "reverse", "await-reverse"], begun)
        reverse = ready(cluster)
        sent = reverse["wire_bytes"]
        allowed = ALLOWED * 41 * BLOCK + HASHES
        expect(sent <= allowed, f"{sent} bytes were sent for a difference of 40 blocks of {BLOCK}: more than {allowed:.0f}")
        text = json.dumps(refused(cluster, "failover", "undo", cluster.GROUP))
        expect("cancel-failback" in text, text)

        # The same connection, captured now.
        rng = random.Random(3)
        for number in range(20):
            host.pwrite(rng.randbytes(BLOCK), (FILLED + 1 + number) * BLOCK)
        host.flush()
        rest = eventually("what is written is at the source", lambda: caught_up(cluster), timeout=60)
        more = rest["wire_bytes"] - sent
        expect(more <= ALLOWED * 20 * BLOCK + HASHES, f"{more} bytes were sent for 20 blocks of {BLOCK}")
        host.shutdown()
        wanted = digest(replica)
        switched = failback(cluster, "switch")
        expect(switched["state"] == "done" and switched["result"]["branch"]["view"] == "failover", switched)
        expect(state(cluster)["phase"] == "failed-back", state(cluster))
        expect(digest(cluster.uri("data")) == wanted, "the source's disk is not what the view was")
        expect(block(cluster.uri("data"), 50) == expected(1, 50), "the source has lost what both had")
        expect(states(cluster) == {"failover": "kept"}, states(cluster))

        # Protected from its first write on.
        fill(cluster.uri("data"), 4, 8, offset=600)
        commit(cluster)
        expect(states(cluster) == {}, states(cluster))
        cluster.replica_is_source()
        again = cluster.status()["wire_bytes"]
        allowed = ALLOWED * (8 + 61) * BLOCK + HASHES
        expect(again <= allowed, f"{again} bytes were sent once it was back: more than {allowed:.0f}")
        text = json.dumps(refused(cluster, "failback", "commit", cluster.GROUP))
        expect("not failed over" in text, text)
    finally:
        cluster.close()


def caught_up(cluster):
    reverse = state(cluster)["reverse"]
    return reverse["ready"] and reverse["durable_seq"] >= reverse["captured_seq"] > 0 and reverse


def under_load(folder):
    """Switched under load with its coordinator killed in the middle, undone, and switched again: at each turn everything
    that was answered is where the group runs."""
    cluster = both_roles(folder)
    try:
        fill(cluster.uri("data"), 1, FILLED)
        cluster.settle()
        replica = lost(cluster)
        returned(cluster)
        writer = Counting(replica)
        failback(cluster, "start")
        ready(cluster)
        seen = writer.answered
        eventually("it writes on", lambda: writer.answered > seen + 100)
        started = failback(cluster, "switch", "--no-wait")
        cluster.coordinator.kill()
        cluster.coordinator.start()
        eventually("the coordinator is back", lambda: cluster.try_command("status"))
        done = cluster.command("failover", "wait", started["operation"], timeout=180)
        expect(done["state"] == "done" and done["verb"] == "switch-failback", done)
        answered = writer.answered
        writer.stop()
        there = Counting.newest(cluster.uri("data"))
        expect(there >= answered, f"{answered} writes were answered, and {there} are at the source")

        # It writes at the source, and goes back to the view.
        fill(cluster.uri("data"), 5, 4, offset=700)
        undone = failback(cluster, "undo")
        expect(undone["state"] == "done" and undone["result"]["fence"] == "confirmed", undone)
        replica = view_uri(undone)
        # What was held at the switch, and answered nobody, may be at either or at both.
        back = Counting.newest(replica)
        expect(answered <= back <= there + 1, f"{answered} writes were answered, {there} were at the source, {back} are in the view")
        expect(not any(block(replica, 700)), "what the source wrote since is in the view")
        text = json.dumps(refused(cluster, "failover", "undo", cluster.GROUP))
        expect("what a failback brought" in text, text)

        fill(replica, 6, 4, offset=710)
        failback(cluster, "start")
        ready(cluster)
        wanted = digest(replica)
        failback(cluster, "switch")
        expect(digest(cluster.uri("data")) == wanted, "the source's disk is not what the view was, the second time")
        commit(cluster)
        cluster.replica_is_source()
    finally:
        cluster.close()


def given_up(folder):
    """Cancelled with the source there, and with it away: its disk is as it was, its failover can be undone, and another
    failback can begin."""
    cluster = both_roles(folder)
    image = folder / "data.img"
    try:
        fill(cluster.uri("data"), 1, FILLED)
        cluster.settle()
        replica = lost(cluster)
        was = image.read_bytes()
        returned(cluster)
        fill(replica, 2, 40)
        failback(cluster, "start")
        ready(cluster)
        fill(replica, 3, 10, offset=50)
        failback(cluster, "cancel")
        expect(state(cluster)["phase"] == "failed-over", state(cluster))
        expect(block(replica, 50) == expected(3, 0), "the view has lost what was written to it")
        failback(cluster, "start")
        ready(cluster)
        cluster.source.kill()
        eventually("the source is missed",
                   lambda: not all(p["connected"] for p in cluster.command("status")["proxies"]))
        cancelled = failback(cluster, "cancel")
        expect(cancelled["steps"][-1]["state"] == "skipped", cancelled["steps"])
        fill(replica, 7, 1, offset=90)
        returned(cluster)
        nothing_left(cluster)
        expect(image.read_bytes() == was, "a failback that was given up has written to the source's disk")
        undo = cluster.command("failover", "undo", cluster.GROUP)
        expect(undo["state"] == "done", undo)
        eventually("the group is protected again", cluster.protected, timeout=60)
        cluster.replica_is_source()
        expect(block(cluster.uri("data"), 0) == expected(1, 0), "the source has lost what it had")
    finally:
        cluster.close()


def one_role(folder):
    """A source that takes no streams says what it lacks."""
    cluster = Cluster(folder, {"data": 8 * MIB})
    try:
        fill(cluster.uri("data"), 1, 4)
        cluster.settle()
        cluster.command("failover", "start", cluster.GROUP, "--to", "latest")
        text = json.dumps(refused(cluster, "failback", "start", cluster.GROUP))
        expect("target.journal" in text and "target.listen" in text, text)
    finally:
        cluster.close()


def killed(folder, rounds, seed):
    """Each process, killed somewhere in a switch: one side runs afterwards, with all that was answered."""
    rng = random.Random(seed)
    cluster = both_roles(folder)
    ends = []
    try:
        fill(cluster.uri("data"), 1, FILLED)
        cluster.settle()
        replica = lost(cluster)
        returned(cluster)
        count = 0
        for number in range(rounds):
            victim = (cluster.source, cluster.target, cluster.coordinator)[number % 3]
            count += 1
            fill(replica, count, 1, offset=500 + count)
            failback(cluster, "start")
            ready(cluster)
            started = failback(cluster, "switch", "--no-wait")
            time.sleep(rng.uniform(0, 0.5))
            victim.kill()
            time.sleep(rng.uniform(0, 2))
            victim.start()
            eventually("the coordinator is back", lambda: cluster.try_command("status"))
            done = eventually("the switch has ended", lambda: ended(cluster, started["operation"]), timeout=180)
            eventually("both are back", cluster.proxies_connected, timeout=60)
            phase = state(cluster)["phase"]
            ends.append(f"{victim.name}: {phase}")
            expect(phase in ("failed-back", "failed-over", "failing-back"), f"{phase} after {victim.name} was killed: {done}")
            if phase == "failed-back":
                uri = eventually("the source serves", lambda: served(cluster.uri("data"), 500 + count), timeout=60)
                expect(block(uri, 500 + count) == expected(count, 0), f"round {number}: the source lacks a write: {done}")
                replica = view_uri(failback(cluster, "undo"))
            elif phase == "failing-back":
                failback(cluster, "cancel")
            nothing_left(cluster)
            replica = eventually("the view is served", lambda: served(replica, 500 + count), timeout=60)
            for past in range(1, count + 1):
                expect(block(replica, 500 + past) == expected(past, 0), f"round {number}: the view lacks write {past}: {done}")
        failback(cluster, "start")
        ready(cluster)
        wanted = digest(replica)
        failback(cluster, "switch")
        expect(digest(cluster.uri("data")) == wanted, "the source's disk is not what the view was")
        commit(cluster)
        cluster.replica_is_source()
        print("# " + ", ".join(ends), flush=True)
    finally:
        cluster.close()


def nothing_left(cluster):
    def left():
        return [c["message"] for c in state(cluster)["conditions"] if c["kind"] == "leftover"]
    try:
        eventually("nothing is left over", lambda: not left(), timeout=90)
    except Failed as error:
        raise Failed(f"{error}: {left()}") from None


def ended(cluster, operation):
    found = cluster.try_command("failover", "show", operation)
    return found and found["state"] in ("done", "failed") and found


def served(uri, number):
    try:
        block(uri, number)
        return uri
    except nbd.Error:
        return None


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    tests = Tests()
    for name, test, *args in (
            ("a failback brings all that was written, and only the difference travels", there_and_back),
            ("a switch under load loses nothing, with its coordinator killed, undone and done again", under_load),
            ("a failback that is given up leaves the source's disk as it was", given_up),
            ("a source that takes no streams says what it lacks", one_role),
            (f"killed in the middle of a switch, one side runs ({rounds} rounds, seed {seed})", killed, rounds, seed)):
        with workspace("failback") as folder:
            tests.run(name, test, folder, *args)
    tests.end()


if __name__ == "__main__":
    main()
