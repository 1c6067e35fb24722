#!/usr/bin/python3
"""The coordinator's state is lost and restored from a backup that is older than a failover, a group and a change of policy:
it observes, takes over what its proxies know better, waits for a word, and destroys nothing. Real processes on loopback.
"""

import json
import os
import subprocess
import time

import nbd

from cluster import AFTERIMAGE, MIB, Cluster, Failed, Tests, digest, eventually, expect, run, workspace

SIZE = 16 * MIB
STATE = ("state.redb", "history.redb")


class Restored(Cluster):
    """A pair with a backup of its coordinator, and what happened since."""

    def __init__(self, folder):
        super().__init__(folder, {"data": SIZE}, retention="1h")
        self.backup = folder / "backup"
        self.state = folder / "coordinator"

    def coordinate(self, *args, yes=True):
        done = subprocess.run([AFTERIMAGE, "coordinator", *map(str, args)], capture_output=True, timeout=60, check=False)
        return done.returncode, (done.stdout + done.stderr).decode(errors="replace"), done.stdout.decode(errors="replace")

    def refuses(self, words, *args):
        code, said, _ = self.coordinate(*args)
        expect(code != 0 and all(word in said for word in words), f"{args}: exit code {code}, not all of {words} in\n{said}")

    def does(self, *args):
        code, said, out = self.coordinate(*args, "--json")
        expect(code == 0, f"{args}: exit code {code}\n{said}")
        return json.loads(out)

    def asked(self, *args):
        return self.does(*args, "--identity", self.identity)

    def make_backup(self):
        self.write(self.uri("data"), 0, b"before the backup ")
        made = self.asked("backup", self.backup)
        expect(made["objects"] > 5 and os.stat(self.backup).st_mode & 0o777 == 0o600, f"{made}")
        text = self.backup.read_text()
        keys = (self.state / "keys.bin").read_bytes()
        expect(keys.hex() not in text and "PRIVATE KEY" not in text, "a secret lies open in the backup")
        # Offline, of the same state, once nobody runs; while one runs it is told so.
        self.refuses(["it runs"], "backup", self.folder / "other", "--data-dir", self.state)

    def since(self):
        """What the backup does not know."""
        self.command("policy", "update", "gold", "--retention", "4h")
        image = self.folder / "later.img"
        with open(image, "wb") as out:
            out.truncate(SIZE)
        self.command("group", "create", "later", "--policy", "gold", "--source", "source", "--target", "target",
                     "--disk", f"late={image}")
        eventually("the later group is protected", lambda: self.phase("later") == "protected", 60)
        self.write(self.uri("data"), 65536, b"before the failover ")
        self.settle()
        done = self.command("failover", "start", self.GROUP, "--to", "latest")
        expect(done["state"] == "done", f"{done}")
        self.view = next(uri for export in done["result"]["view"]["exports"] for uri in export["uris"] if "unix" in uri)
        self.write(self.view, 131072, b"after the failover ")
        self.wanted = digest(self.view)
        self.generation = done["result"]["generation"]
        self.points = self.point_count()

    @staticmethod
    def write(uri, at, text):
        handle = nbd.NBD()
        handle.connect_uri(uri)
        handle.pwrite((text * 512)[:4096], at)
        handle.flush()
        handle.shutdown()

    def phase(self, group):
        try:
            return self.command("status", group)["groups"][0]["phase"]
        except Failed:
            return None

    def point_count(self):
        return len(self.command("point", "list", self.GROUP)["points"])

    def terms(self):
        return [int((self.folder / f"{name}-state" / "term").read_text()) for name in ("source", "target")]

    def lose_state(self):
        self.coordinator.kill()
        lost = self.folder / f"lost-{time.monotonic_ns()}"
        lost.mkdir()
        for name in STATE:
            (self.state / name).rename(lost / name)
        return lost

    def refuse_what_is_no_backup(self):
        lost = self.lose_state()
        whole = self.backup.read_bytes()
        bad = self.folder / "bad"
        into = ("--data-dir", self.state)
        for content, words in (
                (whole[:-1], ["no whole backup"]),
                (whole[:len(whole) // 2], ["no whole backup"]),
                (whole.replace(b"gold", b"silv", 1), ["no whole backup", "changed"]),
                (whole.replace(b'"afterimage_backup":1', b'"afterimage_backup":9', 1), ["version 9", "newer"]),
                (whole.replace(b'"schema":', b'"schema":9', 1), ["version 9", "schema", "newer"]),
                (b"", ["no whole backup"])):
            bad.write_bytes(content)
            self.refuses(words, "restore", bad, *into)
            expect(not (self.state / "state.redb").exists(), "half a restore")
        empty = self.folder / "empty"
        empty.mkdir()
        self.refuses(["ca.pem and keys.bin"], "restore", self.backup, "--data-dir", empty)
        for name in STATE:
            (lost / name).rename(self.state / name)
        self.refuses(["state.redb", "exists"], "restore", self.backup, *into)
        offline = self.does("backup", self.folder / "newest", "--data-dir", self.state)
        expect(offline["objects"] > 8, f"{offline}")
        self.lose_state()

    def restore(self):
        self.does("restore", self.backup, "--data-dir", self.state)
        self.coordinator.start()
        eventually("it answers", lambda: self.coordinator.check() and self.try_command("status"))

    def found(self):
        return self.asked("confirm", "--dry-run")

    def observe(self):
        before = self.terms()
        self.restore()
        found = eventually("both proxies have said what they have",
                           lambda: (lambda f: f["observing"] and not f["unseen"] and len(f["findings"]) >= 3 and f)(self.found()))
        said = "\n".join(found["findings"])
        for words in ('group "shop": failed over since', 'group "later": made after the backup', 'policy "gold": changed'):
            expect(words in said, f"`{words}` is not among\n{said}")
        expect(not found["ended"], f"{found}")
        self.only_observes()
        # One that is started anew before the word asks again.
        self.coordinator.kill()
        self.coordinator.start()
        eventually("they are asked again", lambda: self.coordinator.check() and (self.try_command("status") and
                   (lambda f: f["observing"] and not f["unseen"])(self.found())))
        self.only_observes()
        expect(all(now > old for old, now in zip(before, self.terms())), f"the term does not rise: {before}, {self.terms()}")

    def only_observes(self):
        for command in (("policy", "update", "gold", "--retention", "1s"), ("group", "delete", "later"),
                        ("view", "close", self.GROUP, "failover"), ("token", "create", "x", "--role", "viewer"),
                        ("failover", "start", "later", "--to", "latest")):
            done = subprocess.run([AFTERIMAGE, *command, "--json", "--yes", "--identity", self.identity],
                                  capture_output=True, timeout=60, check=False)
            expect(done.returncode == 3, f"{command}: exit code {done.returncode} {done.stderr!r}")
        self.unharmed()

    def unharmed(self):
        expect(digest(self.view) == self.wanted, "what runs from its view has lost something")
        expect(self.points <= self.point_count(), "restore points are gone")

    def confirm(self):
        expect(not self.asked("confirm", "--yes")["observing"], "it is confirmed and observes")
        shop = next(g for g in self.command("group", "list")["groups"] if g["group"] == self.GROUP)
        expect((shop["phase"], shop["disks"][0]["generation"]) == ("failed-over", self.generation), f"{shop}")
        gold = next(p for p in self.command("policy", "list")["policies"] if p["policy"] == "gold")
        expect(gold["retention_s"] == 4 * 3600, f"an older word would shorten history: {gold}")
        eventually("the later group is protected", lambda: self.phase("later") == "protected", 60)
        views = self.command("view", "list", self.GROUP)["views"]
        uris = [uri for view in views for export in view["exports"] for uri in export["uris"]]
        expect(self.view in uris, f"the view's export is not told: {views}")
        self.told()
        self.unharmed()
        self.write(self.view, 262144, b"after the restore ")
        self.wanted = digest(self.view)

    def told(self):
        """What is decided from now on reaches the proxies."""
        self.command("policy", "update", "gold", "--description", "as ever")

        def same():
            proxies = self.command("proxies", "list")["proxies"]
            return all(p["connected"] and p["observed_version"] == p["desired_version"] > 0 for p in proxies)
        eventually("proxies have what is wanted", same)
        for proxy in (self.source, self.target):
            expect("older than" not in proxy.tail(400), f"{proxy.name} was told something old:\n{proxy.tail()}")

    def without_the_source(self):
        """The same backup once more, while the source is gone: it is named, and may be gone on without; it comes back held."""
        self.lose_state()
        self.source.stop()
        self.restore()
        eventually("the target has said what it has",
                   lambda: [p for p in self.found()["unseen"]] == ["tenants/default/proxies/source"])
        self.refuses(["source", "--without-unseen"], "confirm", "--yes", "--identity", self.identity)
        found = self.asked("confirm", "--yes", "--without-unseen")
        expect(not found["observing"], f"{found}")
        expect(self.phase(self.GROUP) == "failed-over", f"{self.phase(self.GROUP)}")
        self.unharmed()
        later = (self.folder / "journal").stat()
        self.source.start()
        eventually("both proxies are connected", self.proxies_connected, 60)
        eventually("what nobody knows is named", lambda: "nobody knows" in "\n".join(self.found()["findings"]))
        # Its disk was taken from it; that it may write again is nobody's word.
        state = json.loads(run(AFTERIMAGE, "status", self.GROUP, "--json", "--identity", self.identity))["groups"][0]
        expect(state["phase"] == "failed-over", f"{state}")
        self.told()
        expect((self.folder / "journal").stat().st_ino == later.st_ino, "the journal is another")
        self.unharmed()


def main():
    tests = Tests()
    with workspace("restore") as folder:
        made = Restored(folder)
        try:
            steps = [
                ("a backup is made of a coordinator that runs", made.make_backup),
                ("then much happens that it does not know", made.since),
                ("what is no whole backup, or of another version, is not restored; nothing is overwritten",
                 made.refuse_what_is_no_backup),
                ("a restored coordinator observes, and changes nothing", made.observe),
                ("confirmed, it goes on from what its proxies had", made.confirm),
                ("a source that is not there is named, and asked when it comes", made.without_the_source),
            ]
            for name, step in steps:
                if not tests.run(f"restore: {name}", step):
                    print(made.coordinator.tail(40), flush=True)
                    break
        finally:
            made.close()
    tests.end()


if __name__ == "__main__":
    main()
