"""PostgreSQL under pgbench on a protected disk while processes of the product are killed. Its disk is a block device over
QEMU's reconnecting client: it waits while the source is gone, and goes on.

While a killed source is still down, PostgreSQL recovers on a view of the newest point: no commit older than the RPO shown
last is missing. When everything is back and the database is stopped, source and replica are compared byte for byte, no
confirmed commit is missing, and a random older point recovers to the rows that it had.
"""

import contextlib
import random
import subprocess
import time

from cluster import MIB, Cluster, digest, eventually, expect, run
from continuity import protected_again, through_qemu
from postgres import Device, Postgres, Watch, Witness

SIZE = 512 * MIB
POINTS = 6


class PostgresScene:
    """The pair, the device, the database."""

    def __init__(self, folder, rng):
        self.folder = folder
        self.rng = random.Random(rng.random())
        self.ends = contextlib.ExitStack()
        self.cluster = None
        self.device = self.server = None
        self.views = 0
        self.points = []
        self.rows = 0

    def begin(self):
        self.cluster = Cluster(self.folder, {"pg": SIZE})
        self.ends.callback(self.cluster.close)
        uri = self.ends.enter_context(through_qemu(self.folder, self.cluster.uri("pg"), patience=300))
        self.device = Device(self.folder, "source", uri)
        self.ends.callback(self.device.close)
        run("mkfs.ext4", "-q", "-F", self.device.loop)
        self.device.attach()
        self.server = Postgres(self.folder, "source", self.device.mount / "data")
        self.ends.callback(lambda: self.server.stop("immediate"))
        self.server.init()
        self.server.start()
        self.server.query("CREATE TABLE witness (n bigint PRIMARY KEY); CREATE EXTENSION amcheck")
        run(*self.server.as_postgres("/usr/lib/postgresql/15/bin/pgbench", "-h", self.server.sockets, "-i", "-q", "-s", "2",
                                     "postgres"), timeout=300, cwd="/")
        self.cluster.settle(timeout=120)

    @property
    def processes(self):
        return self.cluster.processes

    def round(self, which):
        """One fault under load; then the judgement."""
        for process in self.cluster.processes:
            process.check()
        if self.server.process is None:
            # The round before has failed somewhere in its judgement.
            if not self.device.mounted:
                self.device.attach()
            self.server.start()
        watch = Watch(self.cluster)
        watch.start()
        with open(self.folder / "pgbench.log", "ab") as log:
            bench = subprocess.Popen(
                self.server.as_postgres("/usr/lib/postgresql/15/bin/pgbench", "-h", self.server.sockets, "-c", "4", "-j", "1",
                                        "-T", "600", "-n", "postgres"), stdout=log, stderr=log, cwd="/")
        witness = Witness(self.server, self.rows)
        witness.start()
        try:
            eventually("commits are confirmed", lambda: len(witness.confirmed) > 20 and watch.shown)
            time.sleep(self.rng.uniform(0.2, 2))
            self.strike(which, witness, watch)
            before = len(witness.confirmed)
            eventually("commits are confirmed again", lambda: len(witness.confirmed) > before + 20, timeout=60)
            time.sleep(self.rng.uniform(0, 1))
            expect(bench.poll() is None, "pgbench has ended: see its log")
        finally:
            watch.end()
            if bench.poll() is None:
                bench.terminate()
            bench.wait(30)
            witness.end()
        self.judge(len(witness.confirmed))

    def strike(self, which, witness, watch):
        """Kills, looks at what the replica promises, starts again."""
        processes = [getattr(self.cluster, name) for name in which]
        for process in processes:
            process.kill()
        killed = time.monotonic()
        watch.end()
        if "source" in which:
            for process in processes:
                if process is not self.cluster.source:
                    process.start()
            asked, rpo = watch.shown
            promised = asked - rpo
            counts = eventually("the newest point opens", lambda: self.try_rows(), timeout=60)
            confirmed = list(witness.confirmed)
            must = self.rows + sum(at <= promised for at in confirmed)
            print(f"    source dead: RPO shown {(killed - promised) * 1000:.0f} ms, {counts[0]} rows of "
                  f"{self.rows + len(confirmed)} confirmed, {must} promised", flush=True)
            expect(counts[0] >= must, f"{counts[0]} rows, {must} were promised")
            expect(counts[0] <= self.rows + len(confirmed) + 1, f"{counts[0]} rows, {self.rows + len(confirmed)} confirmed")
            self.cluster.source.start()
        else:
            time.sleep(self.rng.choice([0, 0.3, 1.5]))
            for process in processes:
                process.start()

    def judge(self, confirmed):
        """The database is stopped: compares, recovers older points, goes on."""
        rows = int(self.server.query("SELECT count(*) FROM witness"))
        highest = int(self.server.query("SELECT max(n) FROM witness"))
        expect(rows == highest, f"{rows} rows, the highest is {highest}: there is a gap")
        expect(0 <= rows - self.rows - confirmed <= 1, f"{rows} rows, {self.rows + confirmed} were confirmed")
        self.rows = rows
        self.balanced(self.server)
        self.server.stop()
        self.device.detach()
        eventually("the group is protected again", lambda: protected_again(self.cluster), timeout=120)
        seq = self.cluster.settle(timeout=120)
        self.cluster.replica_is_source()
        if self.points:
            old, wanted = self.rng.choice(self.points)
            found = self.rows_at(f"seq:{old}")
            expect(found == (wanted, wanted), f"record {old} had {wanted} rows, it recovers to {found}")
        self.points = [*self.points[-POINTS:], (seq, rows)]
        self.device.attach()
        self.server.start()

    def balanced(self, server):
        sums = server.query(
            "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(bbalance) FROM pgbench_branches), "
            "(SELECT sum(tbalance) FROM pgbench_tellers), (SELECT coalesce(sum(delta), 0) FROM pgbench_history)").split("|")
        expect(len(set(sums)) == 1, f"accounts, branches, tellers, history: {sums}")

    def try_rows(self):
        """As [`rows_at`] for the newest point; nothing while the target or the coordinator is still starting."""
        if not self.cluster.try_command("view", "list", Cluster.GROUP):
            return None
        return self.rows_at("latest")

    def rows_at(self, point):
        """PostgreSQL recovers on a view of that point: how many rows the witness has there, and its highest number."""
        self.views += 1
        name = f"view{self.views}"
        opened = eventually("a view opens", lambda: self.cluster.try_command(
            "view", "open", Cluster.GROUP, name, "--to", point, "--writable"), timeout=60, pause=0.5)
        uri = next(u for export in opened["exports"] for u in export["uris"] if u.startswith("nbd+unix"))
        try:
            device = Device(self.folder, name, uri)
            server = None
            try:
                device.attach()
                server = Postgres(self.folder, name, device.mount / "data")
                (server.data / "postmaster.pid").unlink(missing_ok=True)
                server.start(timeout=120)
                count, highest = map(int, server.query("SELECT count(*), coalesce(max(n), 0) FROM witness").split("|"))
                expect(count == highest, f"{point}: {count} rows, the highest is {highest}: there is a gap")
                self.balanced(server)
                return count, highest
            finally:
                if server:
                    server.stop("immediate")
                device.close()
        finally:
            self.cluster.close_view(name)

    def close(self):
        self.ends.close()
