#!/usr/bin/python3
"""Plans with real processes: three groups, each with a machine that counts, are tested, failed over in their order, stopped, gone on
with and brought back, while the coordinator is killed in the middle of it.

Needs libnbd-bin, python3-libnbd. Arguments: parts of names of the tests to run.
"""

import os
import sys

from cluster import MIB, Cluster, Tests, digest, eventually, expect, workspace
from machines import Fake, fails, newest, settings

GROUPS = ("shop", "app", "web")
# A script of a plan's: it notes what it is told, and waits while there is a file that holds it up.
SCRIPT = r"""#!/usr/bin/python3
import os, pathlib, sys, time
home = pathlib.Path(__file__).resolve().parent
said = [os.environ[f"AFTERIMAGE_{name}"] for name in ("STEP", "VERB", "WHEN")]
with open(home / "scripts", "a") as out:
    out.write(" ".join([sys.argv[1], *said]) + "\n")
for _ in range(3000):
    if not (home / f"hold-{sys.argv[1]}").exists():
        break
    time.sleep(0.01)
sys.exit(int((home / "answer").read_text()) if sys.argv[1] == "up" and (home / "answer").exists() else 0)
"""


class Site:
    """A protected pair of three groups, with the machines that run from them, at both sites."""

    def __init__(self, folder):
        self.here, self.there = Fake(folder / "here"), Fake(folder / "there")
        self.folder = folder
        self.script = folder / "script"
        self.script.write_text(SCRIPT)
        self.script.chmod(0o755)
        scripts = "".join(f"script.{name} = {{ command = ['{self.script}', '{name}'] }}\n" for name in ("gate", "dns", "up"))
        self.cluster = Cluster(folder, {"data": 8 * MIB}, source_config=f"[machines]\n{self.here.config()}",
                               target_args=("--config", settings(folder, "target", self.there.config("dr") + scripts)))
        for group in GROUPS[1:]:
            with open(folder / f"{group}.img", "wb") as out:
                out.truncate(8 * MIB)
            self.cluster.command("group", "create", group, "--policy", "gold", "--source", "source", "--target", "target",
                                 "--disk", f"data={folder}/{group}.img")
        for group in GROUPS:
            eventually(f"{group} is protected", lambda group=group: self.protected(group), timeout=60)
            self.cluster.command("machine", "create", group, "--group", group, "--source", "hook", "--target", "hook:dr",
                                 "--ready", "hook:dr", "--stop-within", "5s", "--ready-within", "20s")
            self.here.start(group, self.uri(group))
        for group in GROUPS:
            eventually(f"{group} counts", lambda group=group: self.here.answered(f"source-{group}") > 20)

    def close(self):
        self.cluster.close()
        self.here.close()
        self.there.close()

    def status(self, group):
        return self.cluster.command("status", group)["groups"][0]

    def protected(self, group):
        status = self.cluster.try_command("status", group)
        return status and status["groups"][0]["phase"] == "protected" and status["groups"][0]["sync"] is None

    def uri(self, group):
        def known():
            uris = [uri for disk in self.status(group)["disks"] for uri in disk["uris"]]
            return next((uri for uri in uris if uri.startswith("nbd+unix")), None)
        return eventually(f"the status says where the disk of {group} is", known)

    def plan(self, *args):
        return self.cluster.command("plan", *args, timeout=120)

    def newest_run(self):
        history = self.cluster.try_command("plan", "history", "site")
        return history["runs"][0] if history else None

    def step(self, name):
        run = self.newest_run()
        return next(step for step in run["steps"] if step["step"] == name) if run else {"state": "unknown", "stage": ""}

    def kill_coordinator(self):
        self.cluster.coordinator.kill()
        self.cluster.coordinator.start()
        eventually("the coordinator is back", lambda: self.cluster.try_command("status"))

    def scripts(self):
        path = self.folder / "scripts"
        return path.read_text().splitlines() if path.exists() else []

    def hold(self, script):
        (self.folder / f"hold-{script}").touch()

    def let_go(self, script):
        (self.folder / f"hold-{script}").unlink()

    def runs_at(self):
        return ["target" if self.there.runs(f"replica-{group}") else "source" if self.here.runs(f"source-{group}") else "nowhere"
                for group in GROUPS]

    def told_there(self, action):
        return [line.split()[1].removeprefix("replica-") for line in self.there.told() if line.startswith(f"{action} replica-")]


def states(run):
    return [step["state"] for step in run["steps"]]


def there_and_back(folder):
    """Tested, run with the coordinator killed and a stop in the middle, gone on with, undone with the coordinator killed."""
    site = Site(folder)
    try:
        made = site.plan("create", "site", "--step", "shop as=db delay=300ms", "--step",
                         "app after=db ready=up before=gate within=20s", "--step", "web after=app then=dns undo-then=dns")
        expect([step["typed"] for step in made["steps"]][1] == "app after=db ready=up within=20s before=gate", made)
        estimate = site.plan("estimate", "site")
        expect(estimate["rto_ms"] is None and {s["by"] for s in estimate["steps"]} == {"unknown"}, estimate)

        before = [site.here.answered(f"source-{group}") for group in GROUPS]
        tested = site.plan("test", "site")
        expect(tested["state"] == "done" and states(tested) == ["done"] * 3 and tested["rto_ms"] > 300, tested)
        expect(site.runs_at() == ["source"] * 3 and not site.scripts(), "a test has touched what runs")
        for group, counted in zip(GROUPS, before):
            eventually(f"{group} counts on", lambda g=group, c=counted: site.here.answered(f"source-{g}") > c)
            expect(not site.cluster.command("view", "list", group)["views"], "something of a test is left")
        estimate = site.plan("estimate", "site")
        expect(estimate["rto_ms"] and {s["by"] for s in estimate["steps"]} == {"test"}, estimate)
        expect(site.plan("show", "site")["last_test"]["rto_ms"] == tested["rto_ms"], "the last test is kept")

        # The coordinator dies while the script before the second step runs; then the run is to stop.
        site.hold("gate")
        site.plan("run", "site", "--planned", "--no-wait")
        eventually("the second step runs its script", lambda: len(site.scripts()) == 1)
        site.kill_coordinator()
        text = fails(site.cluster, "plan", "run", "site", code=3)
        expect("being run" in text, text)
        stopping = site.plan("stop", "site", "--no-wait")
        expect(stopping["stopped_by"] and stopping["state"] == "running", stopping)
        site.let_go("gate")
        stopped = eventually("it stops", lambda: (run := site.newest_run()) and run["state"] == "stopped" and run, timeout=60)
        expect(states(stopped) == ["done", "done", "pending"] and "stopped" in stopped["steps"][2]["detail"], stopped)
        expect(site.runs_at() == ["target", "target", "source"], "what was being done is finished, and nothing more")
        counts = [line for line in site.scripts() if line.startswith("gate")]
        expect(counts == ["gate app run before"], f"a script is run once for each try: {counts}")

        resumed = site.plan("resume", "site")
        expect(states(resumed) == ["skipped", "skipped", "done"] and resumed["continues"] == stopped["run"], resumed)
        expect(site.runs_at() == ["target"] * 3 and site.told_there("start") == list(GROUPS), site.there.told())
        expect(site.scripts()[-1] == "dns web run then", site.scripts())
        for group in GROUPS:
            answered = site.here.answered(f"source-{group}")
            eventually(f"{group} counts at the target", lambda g=group, a=answered: site.there.answered(f"replica-{g}") > a)
        took = [step["took_ms"] for step in stopped["steps"]]
        expect(took[0] and took[1] and took[2] is None and resumed["steps"][2]["took_ms"], (took, resumed))

        # Back, with the coordinator killed in the middle.
        answered = [site.here.answered(f"source-{group}") for group in GROUPS]
        site.plan("undo", "site", "--no-wait")
        eventually("the undo has begun", lambda: site.step("web")["state"] != "pending")
        site.kill_coordinator()
        undone = eventually("it is undone", lambda: (run := site.newest_run()) and run["ended"] and run, timeout=60)
        expect(undone["verb"] == "undo-plan" and states(undone) == ["done"] * 3, undone)
        expect(site.told_there("stop")[-3:] == ["web", "app", "shop"], site.there.told())
        expect(site.scripts()[-1] == "dns web undo then" and site.runs_at() == ["source"] * 3, site.scripts())
        for group, counted in zip(GROUPS, answered):
            eventually(f"{group} counts on at its source", lambda g=group, c=counted: site.here.answered(f"source-{g}") > c)
            expect(newest(site.uri(group)) > counted, f"{group}: what was answered is missing")
        history = site.plan("history", "site")["runs"]
        expect([run["verb"] for run in history] == ["undo-plan", "run-plan", "run-plan", "test-plan"], history)

        mended(site)
        same(site)
    finally:
        site.close()


def mended(site):
    """A step that fails holds up what comes after it; the plan is mended, and the run goes on. What is failed over already is
    passed over, and not undone."""
    for group in GROUPS:
        eventually(f"{group} is protected", lambda g=group: site.protected(g), timeout=60)
    site.cluster.command("failover", "planned", "shop")
    (site.folder / "answer").write_text("3")
    site.plan("update", "site", "--step", "shop as=db", "--step", "app after=db ready=up within=1s", "--step", "web after=app")
    trial = site.plan("run", "site", "--dry-run")
    expect(states(trial) == ["skipped", "done", "done"] and trial["dry_run"], trial)
    text = fails(site.cluster, "plan", "run", "site", "--planned")
    expect("failed at step app" in text and "plan resume site" in text, text)
    failed = site.newest_run()
    expect(states(failed) == ["skipped", "failed", "pending"] and "after app" in failed["steps"][2]["detail"], failed)
    expect("failed over already" in failed["steps"][0]["detail"], failed)
    site.plan("update", "site", "--step", "shop as=db", "--step", "app after=db", "--step", "web after=app")
    resumed = site.plan("resume", "site")
    expect(states(resumed) == ["skipped", "done", "done"] and site.runs_at() == ["target"] * 3, resumed)
    expect(site.told_there("start").count("app") == 2, "it is looked at again, and not started again")
    undone = site.plan("undo", "site")
    expect(states(undone) == ["skipped", "done", "done"] and "not by this plan" in undone["steps"][0]["detail"], undone)
    expect(site.runs_at() == ["target", "source", "source"], undone)
    site.cluster.command("failover", "undo", "shop")


def same(site):
    """The machines stop, and both sides hold the same."""
    for group in GROUPS:
        site.here.stop(f"source-{group}")
    for group in GROUPS:
        eventually(f"{group} is protected", lambda g=group: site.protected(g), timeout=60)
        cut = site.cluster.command("point", "cut", group, "--label", "same")
        eventually(f"{group}: all is durable", lambda g=group, c=cut: site.status(g)["durable_seq"] >= c["seq"], timeout=60)
        view = site.cluster.command("view", "open", group, "same", "--to", "latest")
        shown = next(uri for uri in view["exports"][0]["uris"] if uri.startswith("nbd+unix"))
        expect(digest(shown) == digest(site.uri(group)), f"{group}: the newest point is not what the source holds")
        site.cluster.command("view", "close", group, "same")


TESTS = {
    "there and back": there_and_back,
}


def main():
    os.environ.setdefault("LC_ALL", "C")
    tests = Tests()
    for name, test in TESTS.items():
        if sys.argv[1:] and not any(part in name for part in sys.argv[1:]):
            continue
        with workspace("plans") as folder:
            tests.run(f"plans: {name}", test, folder)
    tests.end()


if __name__ == "__main__":
    main()
