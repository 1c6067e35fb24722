#!/usr/bin/python3
"""Real faults against real processes, under load. `faults.py [ROUNDS [SEED]]`.

Each round kills a process (or several) at a random moment while clients write through QEMU's reconnecting client, starts
it again, and ends with the host quiet: every answered write is there, source and replica are the same byte for byte, a
random older point, whose content was noted when the host was quiet, still shows that content, and a random record in the
middle of the load is a state that the disk had. The clients are writers that count, long writes with discards, and fio
with verification; in every fifth round PostgreSQL under pgbench (see `postgres_rounds.py`).

Then, once each: a target that stands still, a link of a tenth of the load that is then cut, both also without a spill and
with one on a slow disk, a full journal disk, and a disk that fails writes. Needs root for file systems of its own.
"""

import contextlib
import os
import random
import sys
import time

import nbd

from cluster import MIB, Failed, Tests, eventually, expect, run, workspace
from postgres import able
from postgres_rounds import PostgresScene
from scene import LONG, SIZE, STALL, Fio, Scene, file_system, filtered_file, scene

KILLS = [["source"], ["source"], ["target"], ["target"], ["coordinator"], ["source", "target"],
         ["source", "target", "coordinator"]]


def killed(scene, which):
    """Processes die under load, at a random moment, and come back after a random while."""
    with scene.load() as writers:
        time.sleep(scene.rng.uniform(0.1, 1.5))
        processes = [getattr(scene.cluster, name) for name in which]
        for process in processes:
            process.kill()
        time.sleep(scene.rng.choice([0, 0, 0.3, 1.5]))
        scene.rng.shuffle(processes)
        for process in processes:
            process.start()
        writers.progress()
        time.sleep(scene.rng.uniform(0, 1))
    scene.check()


def stopped(scene, seconds, rung=None, gentle=False):
    """A target that stands still does not hold the hosts up, and is caught up with. `rung` is the lowest one that is
    reached."""
    rungs = set()
    with scene.load(gentle) as writers:
        os.kill(scene.cluster.target.process.pid, 19)  # SIGSTOP
        try:
            writers.stall()
            begun = time.monotonic()
            while time.monotonic() - begun < seconds:
                writers.progress()
                rungs.add(scene.cluster.status()["rung"])
                time.sleep(0.2)
            stall = writers.stall()
            expect(stall < STALL, f"a write took {stall:.1f} s while the target stood still")
        finally:
            os.kill(scene.cluster.target.process.pid, 18)  # SIGCONT
    print(f"    longest write {stall:.2f} s, rungs {sorted(map(str, rungs))}", flush=True)
    if rung:
        expect(rung in rungs and (rung == "dirty" or "dirty" not in rungs), f"rungs were {rungs}; {rung} was to be the lowest")
    scene.check()


def slow_then_cut(scene, seconds):
    """A link of a tenth of the load, then none, then the old one again."""
    with scene.load() as writers:
        time.sleep(2)
        load = scene.captured_per_second()
        scene.relay.rate = max(65536, load / 10)
        print(f"    a load of {load / MIB:.1f} MiB/s, a link of {scene.relay.rate / MIB:.1f}", flush=True)
        try:
            writers.stall()
            time.sleep(seconds)
            writers.progress()
            scene.relay.cut()
            time.sleep(seconds)
            writers.progress()
            stall = writers.stall()
            expect(stall < STALL, f"a write took {stall:.1f} s without a link")
        finally:
            scene.relay.rate = None
            scene.relay.mend()
        writers.progress()
    scene.check()


def full_journal(scene, mount):
    """The disk of the journal is full: hosts go on, the reason is told, and with room again all is mended."""
    filler = mount / "filler"
    free = os.statvfs(mount).f_bavail * os.statvfs(mount).f_frsize
    with scene.load() as writers:
        run("fallocate", "-l", str(max(4096, free - 2 * MIB)), filler)
        try:
            writers.stall()

            def told():
                writers.progress()
                said = [c["message"] for c in scene.cluster.status()["conditions"]]
                return [message for message in said if "space" in message or "room" in message]
            [*_, reason] = eventually("the full disk is told of", told, timeout=40, pause=0.25)
            for _ in range(8):
                writers.progress()
                time.sleep(0.25)
            stall = writers.stall()
            print(f"    longest write {stall:.2f} s; {reason}", flush=True)
            expect(stall < STALL, f"a write took {stall:.1f} s while the journal was full")
            scene.cluster.target.check()
        finally:
            filler.unlink()
    scene.check()


def failing_disk(scene, trigger):
    """The source's disk fails writes for a while: the host is told, and afterwards the replica is what the disk holds."""
    handle = nbd.NBD()
    handle.connect_uri(scene.cluster.uri("data"))
    failed = done = 0
    for turn in range(400):
        if turn == 100:
            trigger.write_text("now")
        if turn == 300:
            trigger.unlink()
        try:
            handle.pwrite(bytes([turn % 251 + 1]) * 8192, LONG[0] + turn * 37 % 3400 * 8192)
            done += 1
        except nbd.Error as error:
            expect(100 <= turn < 300, f"write {turn}: {error}")
            failed += 1
    handle.flush()
    handle.shutdown()
    expect(failed > 0 and done >= 200, f"{done} writes succeeded, {failed} failed")
    scene.cluster.source.check()

    def same():
        # What failed is read again within seconds; until then the replica calls it unreadable.
        try:
            return scene.cluster.replica_is_source() or True
        except Failed:
            return False
    eventually("the replica is what the disk holds", same, timeout=30, pause=1)
    scene.check()


@contextlib.contextmanager
def slow_file_system(folder):
    """A file system whose disk moves 16 MiB a second and is 20 ms late with each write."""
    backing = folder / "slow.img"
    with open(backing, "wb") as file:
        file.truncate(512 * MIB)
    run("mkfs.ext4", "-q", "-F", backing)
    filters = ["--filter=delay", "--filter=rate", "wdelay=20ms", "rate=128M"]
    with filtered_file(folder, "slow-disk", backing, *filters) as image:
        with file_system(folder, "slow-mount", 0, image) as mount:
            yield mount


def main():
    tests = Tests()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    seconds = float(os.environ.get("FAULT_SECONDS", "30"))
    print(f"faults.py {rounds} {seed}", flush=True)
    rng = random.Random(seed)

    def judged(name, scene, function, *args):
        if not tests.run(name, function, scene, *args):
            for process in scene.cluster.processes:
                print(f"--- {process.name}\n{process.tail(40)}", flush=True)
                if not process.alive():
                    process.start()

    databases = rounds // 5
    with workspace("faults") as folder, scene(folder, rng) as one:
        tests.run("a protected pair is what its source is", one.check)
        for turn in range(rounds - databases):
            which = rng.choice(KILLS)
            judged(f"round {turn + 1}: {' and '.join(which)} killed", one, killed, which)
        judged(f"the target stands still for {seconds:.0f} s", one, stopped, seconds)
        judged("the link is slow, then cut", one, slow_then_cut, seconds / 3)
    reason = able()
    if reason:
        print(f"skip - rounds under PostgreSQL: {reason}")
    elif databases:
        with workspace("faults-postgres") as folder:
            os.chmod(folder, 0o755)
            base = PostgresScene(folder, rng)
            try:
                if tests.run("PostgreSQL runs on a protected disk", base.begin):
                    for turn in range(databases):
                        which = rng.choice(KILLS)
                        judged(f"PostgreSQL, round {turn + 1}: {' and '.join(which)} killed", base, PostgresScene.round, which)
            finally:
                base.close()
    # Without a spill the dirty map is reached at once, and a resync is what mends.
    with workspace("dirty") as folder, scene(folder, rng, source_config="spill_budget = 0") as one:
        tests.run("without a spill: a protected pair", one.check)
        judged("without a spill: the target stands still", one, stopped, 5)
        judged("without a spill: the link is slow, then cut", one, slow_then_cut, 5)
        judged("without a spill: source and target killed", one, killed, ["source", "target"])
    if os.geteuid() == 0:
        with workspace("slow") as folder, slow_file_system(folder) as mount:
            config = f'spill = "{mount}/spill"\nspill_budget = "256MiB"\nspill_reserve = "16MiB"\nqueue = "32MiB"'
            with scene(folder, rng, source_config=config) as one:
                tests.run("a slow spill: a protected pair", one.check)
                judged("a slow spill: the target stands still, and no point is lost", one, stopped, 20, "spilling", True)
                judged("a slow spill: more than it can take", one, stopped, 5, "dirty")
                judged("a slow spill: source and target killed", one, killed, ["source", "target"])
        with workspace("full") as folder, file_system(folder, "small", 512 * MIB) as mount:
            with scene(folder, rng, journal=mount / "journal") as one:
                tests.run("a small journal: a protected pair", one.check)
                judged("the journal's disk is full for a while", one, full_journal, mount)
    else:
        print("skip - a spill on a slow disk, and a full journal disk (needs root)")
    with workspace("failing") as folder:
        backing, trigger = folder / "backing.img", folder / "trigger"
        with open(backing, "wb") as file:
            file.truncate(SIZE)
        with filtered_file(folder, "failing", backing, "--filter=error", "error-pwrite=EIO", "error-pwrite-rate=50%",
                           f"error-pwrite-file={trigger}") as image, scene(folder, rng, image=image) as one:
            tests.run("a disk that can fail: a protected pair", one.check)
            judged("the source's disk fails writes for a while", one, failing_disk, trigger)
    print(f"{Scene.looked} records in the middle of a load were looked at; {Scene.none} were no restore point", flush=True)
    print(f"fio verified in {Fio.verified} rounds; in {Fio.early} it had not begun", flush=True)
    tests.run("records in the middle of a load were looked at", lambda: expect(Scene.looked > 0, "none"))
    tests.run("fio verified what it wrote", lambda: expect(Fio.verified > Fio.early, f"{Fio.verified} of {Fio.early} more"))
    tests.end()


if __name__ == "__main__":
    main()
