#!/usr/bin/python3
"""The source's site and the coordinator are gone: the target alone decides, and the next coordinator that it meets takes that
over. Real processes on loopback; with the same store, with one restored from a backup, with nothing left but the journal.

    tests/local.py [ROUNDS [SEED]]      rounds of a target that is killed in the middle of it; 3 if not said

Needs libnbd-bin, python3-libnbd.
"""

import json
import pathlib
import random
import shutil
import subprocess
import sys
import time

from cluster import AFTERIMAGE, MIB, Cluster, Tests, connects, digest, eventually, expect, run, workspace
from failover import block, expected, fill
from machines import Fake, fails, settings

SIZE = 32 * MIB


def over(cluster, *args, code=0, group=Cluster.GROUP):
    """`failover local`; its JSON, or what it says."""
    command = [AFTERIMAGE, "failover", "local", group, "--unconfirmed", group, "--yes", "--json", *map(str, args)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False, stdin=subprocess.DEVNULL)
    said = done.stdout.decode() + done.stderr.decode()
    expect(done.returncode == code, f"{command}: exit code {done.returncode}\n{said}\n{cluster.target.tail()}")
    return json.loads(done.stdout) if code == 0 else said


def uri(done, disk="data"):
    [export] = [e for e in done["exports"] if e["disk"] == disk]
    return next(u for u in export["uris"] if u.startswith("nbd+unix"))


def at_proxy(cluster):
    return ("--state", cluster.folder / "target-state")


def lost(cluster, folder):
    """All of the source's site, and the coordinator."""
    cluster.source.kill()
    cluster.coordinator.kill()
    for path in (folder / "source-state", folder / "data.img"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def taken_over(cluster, done):
    """The group is failed over, to that view, and its target has nothing to tell any more."""
    def so():
        views = (cluster.try_command("view", "list", cluster.GROUP) or {"views": []})["views"]
        return [v for v in views if done["view"] == f"{cluster.GROUP}.{v['view']}" and v["open"] and v["exports"]]
    [view] = eventually("the coordinator has taken it over", so)
    expect(cluster.status()["phase"] == "failed-over", cluster.status())
    expect(view["kind"] == "failover" and view["point"]["seq"] == done["point"]["seq"], view)
    eventually("the decision's file has gone", lambda: not list((cluster.folder / "journal/streams").glob("*/failover")))
    return view


def same_store(folder):
    """The proxy of the target's host decides, and starts the machine; a kill changes nothing; the coordinator that comes back
    takes it over, and can undo it, since here the source is only away."""
    there = Fake(folder / "there")
    cluster = Cluster(folder, {"data": SIZE}, target_args=("--config", settings(folder, "target", there.config("dr"))))
    try:
        cluster.command("machine", "create", "web", "--group", cluster.GROUP, "--target", "hook:dr")
        fill(cluster.uri("data"), 1, 40)
        cluster.settle()
        text = over(cluster, *at_proxy(cluster), code=3)
        expect("afterimage failover start" in text, f"with a coordinator there: {text}")
        wanted = digest(cluster.uri("data"))
        advised(cluster)
        cluster.coordinator.kill()
        text = over(cluster, *at_proxy(cluster), code=5, group="shopp")
        expect("shop" in text, text)

        # Something fails: it stays decided, and is gone on with.
        there.fails("start", "no room here")
        text = over(cluster, *at_proxy(cluster), code=1)
        expect("no room here" in text and "not on" in text, text)
        decisions = list((folder / "journal/streams").glob("*/failover"))
        expect(len(decisions) == 1, f"{decisions}")
        cluster.target.kill()
        cluster.target.start()
        there.obeys("start")
        eventually("the proxy answers", lambda: connects(str(folder / "target-state/local.sock")) and cluster.target.check())
        done = over(cluster, *at_proxy(cluster), "--to", "seq:1")
        expect(done["repeated"] and done["point"]["seq"] > 1 and done["machines"][0]["on"], done)
        replica = uri(done)
        eventually("the machine counts", lambda: there.answered("replica-web") > 20)
        there.close()
        fill(replica, 2, 8, offset=100)
        # Its first block is the machine's.
        expect(block(replica, 1) == expected(1, 1) and block(replica, 101) == expected(2, 1), "it is not what it was")

        # The source comes back first: it hears that it is fenced.
        cluster.source.start()
        eventually("the source holds all I/O", lambda: "this source has been fenced" in cluster.source.log.read_text())

        cluster.coordinator.start()
        taken_over(cluster, done)
        eventually("the source is told to hold", lambda: cluster.status()["disks"][0]["state"] in ("held", "fenced"))
        listed = cluster.command("failover", "list", cluster.GROUP)["failovers"]
        expect(listed[0]["operation"] == done["operation"] and listed[0]["state"] == "done", listed)
        expect(cluster.command("machine", "show", "web")["runs_from"] == done["view"].split(".")[1], "it is not noted to run")
        expect(block(replica, 101) == expected(2, 1), "what was written to the view is lost")
        cluster.target.kill()
        cluster.target.start()
        eventually("the proxies are back", cluster.proxies_connected)
        eventually("the view is open again", lambda: served(replica))
        expect(block(replica, 101) == expected(2, 1), "what was written to the view is lost with the proxy")
        undone = cluster.command("failover", "undo", cluster.GROUP)
        expect(undone["state"] == "done", undone)
        eventually("the group is protected again", cluster.protected, timeout=60)
        cluster.replica_is_source()
        expect(digest(cluster.uri("data")) == wanted, "the source's disk is not what it was")
    finally:
        cluster.close()
        there.close()


def advised(cluster):
    """What is advised before and after the source is lost, and what is said before that is done."""
    advise = lambda: cluster.command("failover", "advise", cluster.GROUP)  # noqa: E731
    found = advise()
    expect(found["advice"]["verb"] is None and found["link"] == "up" and found["source"]["connected"], found)
    expect([(v["verb"], v["fits"]) for v in found["verbs"]] == [("planned-failover", True), ("failover", True)], found)
    cluster.source.kill()
    eventually("the source is missed", lambda: not advise()["source"]["connected"])
    found = advise()
    expect(found["advice"]["command"].endswith("--unconfirmed shop") and "make sure" in found["advice"]["why"], found)
    expect([v["fits"] for v in found["verbs"]] == [False, False, True], found)
    expect("cannot be reached" in found["verbs"][1]["refused"] and found["verbs"][2]["loses"]["ms"] > 0, found)
    shown = run(AFTERIMAGE, "failover", "advise", cluster.GROUP, "--identity", cluster.identity).decode()
    expect("NOT connected" in shown and all(len(line) <= 100 for line in shown.splitlines()), shown)
    asked = subprocess.run([AFTERIMAGE, "failover", "start", cluster.GROUP, "--to", "latest", "--identity", cluster.identity],
                           capture_output=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    said = asked.stderr.decode()
    expect(asked.returncode == 3 and "Lost:" in said and "Not connected: source" in said, said)
    expect("What fits better" in said and "--unconfirmed shop" in said, said)


def served(address):
    try:
        block(address, 0)
        return True
    except Exception:  # noqa: BLE001: not yet
        return False


def from_a_backup(folder):
    """All of the source's site and the coordinator's store are deleted; a store from a backup takes it over."""
    cluster = Cluster(folder, {"data": SIZE})
    try:
        cluster.command("machine", "create", "web", "--group", cluster.GROUP, "--memory", "384MiB")
        fill(cluster.uri("data"), 1, 40)
        backup = folder / "backup"
        run(AFTERIMAGE, "coordinator", "backup", backup, "--identity", cluster.identity)
        before = cluster.settle()
        fill(cluster.uri("data"), 2, 10, offset=50)
        cluster.settle()
        wanted = digest(cluster.uri("data"))
        lost(cluster, folder)
        for name in ("state.redb", "history.redb"):
            (folder / "coordinator" / name).unlink()
        done = over(cluster, *at_proxy(cluster), "--reason", "the site burns")
        replica = uri(done)
        expect(digest(replica) == wanted, "the newest point is not what the source's disk was")
        expect(done["point"]["seq"] > before and done["fence"] == "unconfirmed", done)
        fill(replica, 3, 5, offset=80)
        wanted = digest(replica)

        run(AFTERIMAGE, "coordinator", "restore", backup, "--data-dir", folder / "coordinator")
        cluster.coordinator.start()
        asked = lambda *args: json.loads(run(AFTERIMAGE, "coordinator", "confirm", *args, "--json", "--identity", cluster.identity))  # noqa: E731
        eventually("it answers", lambda: cluster.coordinator.check() and cluster.try_command("status"))
        eventually("the target has said what it has",
                   lambda: "failed over since" in "\n".join(asked("--dry-run")["findings"]))
        asked("--yes", "--without-unseen")
        taken_over(cluster, done)
        expect(digest(replica) == wanted, "what was written to the view is lost")
        expect(cluster.command("machine", "show", "web")["memory_bytes"] == 384 * MIB, "the backup lacks the machine")
        text = fails(cluster, "failover", "start", cluster.GROUP, "--to", "latest", code=3)
        expect("failed over already" in text, text)
    finally:
        cluster.close()


def nothing_but_the_journal(folder):
    """The target's proxy and its state are gone, too: the journal opens by the recovery key, and what is written there is found
    by the proxy that comes next, and by the coordinator."""
    cluster = Cluster(folder, {"data": SIZE})
    try:
        key = folder / "recovery-key"
        cluster.command("key", "recovery", "--out", key)
        [stream] = (folder / "journal/streams").iterdir()
        fill(cluster.uri("data"), 1, 40)
        past = cluster.settle()
        # Under the recovery key, which the target has been told of meanwhile.
        eventually("the journal opens by the recovery key",
                   lambda: json.loads(run(AFTERIMAGE, "journal", "list", folder / "journal", "--recovery-key-file", key,
                                          "--json"))["journals"][0]["opens"])
        wanted = digest(cluster.uri("data"))
        fill(cluster.uri("data"), 2, 10, offset=50)
        cluster.settle()
        views = ("--views", f"unix:{folder}/rescue.sock")
        by_key = ("--journal", folder / "journal", *views, "--recovery-key-file", key)
        lost(cluster, folder)
        text = over(cluster, *by_key, code=1)
        expect("does the proxy of this journal still run" in text, text)
        expect(not (stream / "failover").exists(), "decided while another proxy has the journal")
        cluster.target.stop()
        text = over(cluster, *at_proxy(cluster), code=4)
        expect("start it" in text, text)
        command = [AFTERIMAGE, "failover", "local", cluster.GROUP, "--unconfirmed", cluster.GROUP, "--yes", "--json", "--to",
                   f"seq:{past}", *map(str, by_key)]
        with open(folder / "local.log", "ab") as log:
            alone = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        line = alone.stdout.readline()
        expect(line, (folder / "local.log").read_text()[-3000:])
        done = json.loads(line)
        expect(done["ready"] and done["point"]["seq"] == past, done)
        replica = uri(done)
        expect(digest(replica) == wanted, "that point is not what the source's disk was")
        fill(replica, 3, 5, offset=80)
        wanted = digest(replica)
        alone.kill()
        alone.wait()

        # The proxy, with what it had; then the coordinator.
        cluster.target.start()
        eventually("it has the view again", lambda: served(replica_of(cluster, done)))
        expect(digest(replica_of(cluster, done)) == wanted, "what was written there is lost")
        cluster.coordinator.start()
        taken_over(cluster, done)
        expect(digest(replica_of(cluster, done)) == wanted, "what was written there is lost with its being taken over")
    finally:
        cluster.close()


def killed(folder, rounds, seed):
    """The target's proxy is killed somewhere in it, with its source alive: either nothing was decided; or it stays
    decided, the source holds all I/O, and saying the same again ends it, at the point of then."""
    rng = random.Random(seed)
    cluster = Cluster(folder, {"data": SIZE})
    ends = []
    try:
        fill(cluster.uri("data"), 1, 40)
        source = cluster.uri("data")
        for number in range(1, rounds + 1):
            fill(source, number, 2, offset=100)
            cluster.settle()
            cluster.coordinator.kill()
            fenced = cluster.source.log.read_text().count("has been fenced")
            command = [AFTERIMAGE, "failover", "local", cluster.GROUP, "--unconfirmed", cluster.GROUP, "--yes", "--json",
                       *map(str, at_proxy(cluster))]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as asking:
                time.sleep(rng.uniform(0, 0.25))
                cluster.target.kill()
                asking.wait(timeout=60)
            decisions = list((folder / "journal/streams").glob("*/failover"))
            cluster.target.start()
            eventually("the proxy answers", lambda: connects(str(folder / "target-state/local.sock")) and cluster.target.check())
            if decisions:
                eventually("the source holds all I/O", lambda: cluster.source.log.read_text().count("has been fenced") > fenced)
            done = over(cluster, *at_proxy(cluster))
            ends.append("decided" if decisions else "not decided")
            expect(done["repeated"] == bool(decisions), f"round {number}: {done}")
            expect(block(uri(done), 101) == expected(number, 1), f"round {number}: it is not what it was")
            cluster.coordinator.start()
            taken_over(cluster, done)
            eventually("both are back", cluster.proxies_connected, timeout=60)
            expect(cluster.command("failover", "undo", cluster.GROUP)["state"] == "done", "it is not undone")
            eventually("the group is protected again", cluster.protected, timeout=60)
        cluster.replica_is_source()
        print("# " + ", ".join(ends), flush=True)
    finally:
        cluster.close()


def replica_of(cluster, done, disk="data"):
    return f"nbd+unix:///{done['view']}/{disk}?socket={cluster.views_socket}"


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    tests = Tests()
    for name, test, *args in (
            ("the target decides, and the coordinator that comes back takes it over", same_store),
            ("with the source's site and the coordinator's store deleted, a backup takes it over", from_a_backup),
            ("by the journal and the recovery key alone", nothing_but_the_journal),
            (f"killed in the middle of it ({rounds} rounds, seed {seed})", killed, rounds, seed)):
        with workspace("local") as folder:
            tests.run(f"local: {name}", test, pathlib.Path(folder), *args)
    tests.end()


if __name__ == "__main__":
    main()
