#!/usr/bin/python3
"""The commands by which a host is set up and looked at: real processes, as an operator runs them."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import tempfile

from cluster import AFTERIMAGE, MIB, Cluster, Failed, Process, Tests, eventually, expect, free_port, workspace


def command(*args, code=0, env=None, stdin=None):
    """A command and its exit code; standard output and standard error."""
    done = subprocess.run([str(AFTERIMAGE), *map(str, args)], capture_output=True, timeout=60, check=False, input=stdin,
                          env={**os.environ, **(env or {})})
    expect(done.returncode == code, f"{args}: exit code {done.returncode}, not {code}\n{done.stdout.decode()[-3000:]}"
                                    f"{done.stderr.decode()[-2000:]}")
    return done.stdout.decode(), done.stderr.decode()


class Terminal:
    """A command in a terminal of its own, and what stands on that."""

    def __init__(self, folder, *args, width=150, height=40):
        # A server that ends takes a moment, and its socket is not to be used again.
        self.socket = pathlib.Path(tempfile.mkdtemp(dir=folder)) / "tmux"
        line = shlex.join([str(AFTERIMAGE), *map(str, args)])
        self.tmux("-f", "/dev/null", "new-session", "-d", "-x", width, "-y", height,
                  f"echo before; {line}; echo ended with $?; stty -a; sleep 60")

    def tmux(self, *args):
        done = subprocess.run(["tmux", "-S", str(self.socket), *map(str, args)], capture_output=True, timeout=20, check=False)
        expect(done.returncode == 0, f"tmux {args}: {done.stderr.decode()}")
        return done.stdout.decode()

    def text(self):
        return self.tmux("capture-pane", "-p")

    def shows(self, *words, without=()):
        try:
            return eventually(f"{words} on the screen", lambda: (
                lambda text: all(w in text for w in words) and not any(w in text for w in without) and text)(self.text()))
        except Failed as failed:
            raise Failed(f"{failed}\n{self.text()}") from None

    def keys(self, *keys):
        self.tmux("send-keys", *keys)

    def resize(self, width, height):
        self.tmux("resize-window", "-x", width, "-y", height)

    def pid(self):
        """Of the command."""
        shell = self.tmux("list-panes", "-F", "#{pane_pid}").strip()
        return int(pathlib.Path(f"/proc/{shell}/task/{shell}/children").read_text().split()[0])

    def close(self):
        subprocess.run(["tmux", "-S", str(self.socket), "kill-server"], capture_output=True, timeout=20, check=False)


class Pair:
    """A coordinator, a source and a target, whose settings also stand in files."""

    def __init__(self, folder):
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir()
        self.cluster = Cluster(folder, {"data": 16 * MIB})
        self.identity = self.cluster.identity

    def doctor(self, *args, code=0, home=None):
        """The checks by name, each a list: one for each file or address."""
        env = {"HOME": str(home or self.home), "XDG_CONFIG_HOME": "", "AFTERIMAGE_IDENTITY": ""}
        env = {name: value for name, value in env.items() if name == "HOME" or value}
        document = json.loads(command("doctor", *args, "--json", code=code, env=env)[0])
        expect(document["ok"] == (code == 0), f"ok is {document['ok']}")
        found = {}
        for check in document["checks"]:
            expect(check["state"] == "ok" or check["remedy"] is not None, f"not a word of what to do: {check}")
            found.setdefault(check["check"], []).append(check)
        return found

    def doctor_of_a_host(self):
        """Nothing is set up: kernel, limits, clock, and a folder that is measured, in which nothing stays."""
        probed = self.folder / "probed"
        probed.mkdir()
        found = self.doctor("--folder", probed, "--probe", "300ms")
        expect({"kernel", "io_uring", "open files", "clock", "free space", "disk speed"} <= set(found), f"{found.keys()}")
        expect("certificate" not in found, "an identity that is not there was looked for")
        expect(found["io_uring"][0]["state"] == "ok", found["io_uring"])
        speed = found["disk speed"][0]["measured"]
        expect(speed["synced_writes_per_s"] > 0 and speed["sequential_bytes_per_s"] > 0, f"{speed}")
        expect(speed["synced_write_p50_ms"] <= speed["synced_write_p99_ms"], f"{speed}")
        expect(list(probed.iterdir()) == [], "the probe left something")
        text = command("doctor", "--probe", "0s", env={"HOME": str(self.home)})[0]
        expect(all(len(line) <= 100 for line in text.splitlines()) and "io_uring" in text, text)

    def config(self, name, text):
        path = self.folder / f"{name}.toml"
        path.write_text(f'name = "{name}"\nstate_dir = "{self.folder / f"{name}-state"}"\n[coordinator]\n'
                        f'address = "127.0.0.1:{self.cluster.port}"\n{text}')
        return path

    def doctor_of_roles(self):
        """Of each role that runs: its certificate, the coordinator and its clock, where it listens and connects to."""
        source = self.config("source", f'[source]\nnbd = ["unix:{self.cluster.source_socket}"]\n')
        found = self.doctor("proxy", "--config", source, "--probe", "0s")
        expect("proxy/source" in found["certificate"][0]["found"], found["certificate"])
        expect(found["coordinator"][0]["state"] == "ok", found["coordinator"])
        expect(abs(found["clock offset"][0]["measured"]["offset_ms"]) < 1000, found["clock offset"])
        reached = {check["of"] for check in found["can connect"]}
        expect(f"127.0.0.1:{self.cluster.stream_port}" in reached, f"the target is not among {reached}")
        expect(found["can listen"][0]["state"] == "warn", "its own socket is not seen")
        target = self.config("target", f'[target]\njournal = "{self.folder / "journal"}"\n'
                                       f'listen = "127.0.0.1:{self.cluster.stream_port}"\n')
        found = self.doctor("proxy", "--config", target, "--probe", "100ms")
        expect(found["disk speed"][0]["measured"]["direct_io_align_bytes"] in (512, 4096), found["disk speed"])
        settings = self.folder / "coordinator.toml"
        settings.write_text(f'data_dir = "{self.folder / "coordinator"}"\nlisten = ["127.0.0.1:{self.cluster.port}"]\n')
        found = self.doctor("coordinator", "--config", settings, "--probe", "0s")
        expect(found["authority"][0]["state"] == "ok" and found["policy keys"][0]["state"] == "ok", f"{found}")

    def doctor_finds(self):
        """What is wrong is a failure with exit code 1, and names what it is."""
        bad = self.folder / "bad.toml"
        bad.write_text('name = "x"\nstate_dir = "/s"\n[coordinator]\naddress = "c:1"\n[source]\nmemry = "1GiB"\n')
        found = self.doctor("proxy", "--config", bad, "--probe", "0s", code=1)
        expect("memry" in found["configuration"][0]["found"], found["configuration"])
        silent = f"127.0.0.1:{free_port()}"
        found = self.doctor("--connect", silent, "--probe", "0s", code=1)
        expect(found["can connect"][0]["of"] == silent and found["can connect"][0]["state"] == "fail", f"{found}")
        # An operator's identity is no proxy's, and one that others may read is nobody's.
        stolen = self.folder / "stolen-state"
        stolen.mkdir()
        (stolen / "identity.json").write_text(self.identity.read_text())
        (stolen / "identity.json").chmod(0o600)
        wrong = self.config("stolen", '[source]\nnbd = ["unix:/run/none/x.sock"]\n')
        found = self.doctor("proxy", "--config", wrong, "--probe", "0s", code=1)
        expect("admin/" in found["certificate"][0]["found"], found["certificate"])
        (stolen / "identity.json").chmod(0o644)
        found = self.doctor("--identity", stolen / "identity.json", "--probe", "0s", code=1)
        expect("others" in found["certificate"][0]["found"], found["certificate"])
        out, error = command("doctor", "--connect", silent, "--probe", "0s", code=1, env={"HOME": str(self.home)})
        expect("to do:" in out and "one check failed" in error, out + error)

    def init(self):
        """A coordinator and a pair run by what was written; what is there is not written over."""
        folder = self.folder / "written"
        folder.mkdir()
        env = {"HOME": str(self.home)}
        ports = [free_port(), free_port()]
        # Another's folder each: two files beside each other would say that both are on this host.
        files = {role: folder / role / ("coordinator.toml" if role == "coordinator" else "proxy.toml")
                 for role in ("coordinator", "source", "target")}
        for path in files.values():
            path.parent.mkdir()
        at = f"127.0.0.1:{ports[0]}"
        command("init", "coordinator", "--listen", at, "--state", folder / "c", "--out", files["coordinator"], env=env)
        args = ("init", "source", "--name", "src", "--coordinator", at, "--state", folder / "s", "--token-file",
                folder / "src.token", "--out", files["source"])
        error = command(*args, code=3, env=env)[1]
        expect("--anyway" in error and not files["source"].exists(), f"a source on the coordinator's host: {error}")
        command(*args, "--anyway", env=env)
        made = json.loads(command("init", "target", "--name", "tgt", "--coordinator", at, "--state", folder / "t", "--listen",
                                  f"127.0.0.1:{ports[1]}", "--journal", folder / "j", "--token-file", folder / "tgt.token",
                                  "--out", files["target"], "--json", env=env)[0])
        expect(made["file"] == str(files["target"]) and made["config"] == files["target"].read_text(), f"{made}")
        before = files["source"].read_text()
        error = command(*args, "--anyway", code=6, env=env)[1]
        expect("--force" in error and files["source"].read_text() == before, error)
        command(*args, "--anyway", "--force", env=env)
        # The coordinator that runs knows a group whose disks are on this host.
        error = command("init", "coordinator", "--identity", self.identity, code=3, env=env)[1]
        expect("shop" in error, error)
        expect("a role" not in command("init", "target", code=2, env=env)[1], "a proxy without a coordinator")

        # NBD's and the views' sockets would be under /run: here they are not.
        for role in ("source", "target"):
            files[role].write_text(files[role].read_text().replace("/run/afterimage", str(folder)))
        processes = [Process(folder, "coordinator", "coordinator", "--config", files["coordinator"])]
        try:
            admin = folder / "c" / "admin.json"
            eventually("the coordinator of the file answers", lambda: processes[0].check() and admin.exists() and
                       subprocess.run([AFTERIMAGE, "status", "--identity", admin], capture_output=True).returncode == 0)
            for name, role in (("src", "source"), ("tgt", "target")):
                token = command("token", "create", name, "--role", "proxy", "--identity", admin)[0]
                (folder / f"{name}.token").write_text(token)
                processes.append(Process(folder, name, "proxy", "--config", files[role]))
            def connected():
                for process in processes:
                    process.check()
                proxies = json.loads(command("proxies", "--json", "--identity", admin)[0])["proxies"]
                return sum(proxy["connected"] for proxy in proxies) == 2
            eventually("both proxies of the files are connected", connected)
        finally:
            for process in processes:
                process.stop()

    def apply(self, *args, code=0, stdin=None):
        """The document that it prints, or its error."""
        out, error = command("apply", *args, "--json", "--yes", "--identity", self.identity, code=code,
                             stdin=stdin and stdin.encode())
        return json.loads(out) if out.strip() else json.loads(error.strip().splitlines()[-1])["error"]

    def revision(self):
        """How many changes operators have made: what proxies report is none."""
        records = self.cluster.command("audit", "list", "--limit", "0")["records"]
        return sum(record["actor"].startswith("admin/") for record in records)

    def applied(self):
        """A difference is shown, then made; a second time there is none, and nothing is sent."""
        image = self.folder / "web.img"
        with open(image, "wb") as out:
            out.truncate(8 * MIB)
        more = self.folder / "more.img"
        with open(more, "wb") as out:
            out.truncate(8 * MIB)
        policies, groups = self.folder / "policies.toml", self.folder / "groups.toml"
        policies.write_text('[policy.gold]\nrpo = "750ms"\n[policy.silver]\nretention = "2h"\nhours = []\n')
        groups.write_text(f'[group.web]\npolicy = "silver"\nsource = "source"\ntarget = "target"\n[group.web.disk.root]\n'
                          f'path = "{image}"\n[group.shop]\npolicy = "gold"\ndescription = "the shop"\n')
        files = ("-f", policies, "-f", groups)
        before = self.revision()
        planned = self.apply(*files, "--dry-run", code=7)
        names = [(c["change"], c["kind"], c["name"]) for c in planned["changes"]]
        expect(names == [("update", "policy", "gold"), ("create", "policy", "silver"), ("create", "group", "web"),
                         ("update", "group", "shop")], f"{names}")
        expect(planned["changes"][0]["fields"] == [{"field": "rpo", "from": "1s", "to": "750ms"}], f"{planned}")
        expect(self.revision() == before, "a dry run has changed something")
        text = command("apply", *files, "--dry-run", "--identity", self.identity, code=7)[0]
        expect("    rpo: 1s -> 750ms\n" in text and '+ group "web"' in text, text)
        error = command("apply", *files, "--identity", self.identity, code=3)[1]
        expect("--yes" in error and self.revision() == before, error)

        done = self.apply(*files)
        expect([c["state"] for c in done["changes"]] == ["done"] * 4, f"{done}")
        expect(self.cluster.command("policy", "show", "gold")["rpo_target_ms"] == 750, "the RPO")
        shop = self.cluster.command("group", "show", "shop")
        expect(shop["description"] == "the shop" and len(shop["disks"]) == 1, f"{shop}")
        after = self.revision()
        expect(self.apply(*files) == {"changes": [], "dry_run": False}, "a second time")
        expect(self.apply(*files, "--dry-run")["changes"] == [], "a dry run of what is so")
        expect(self.revision() == after, "the second time has changed something")
        text = command("apply", *files, "--identity", self.identity)[0]
        expect(text == "nothing to change\n", text)

        grown = f'[group.shop.disk.more]\npath = "{more}"\n'
        done = self.apply("-f", "-", stdin=grown)
        expect(done["changes"][0]["group"] == "shop" and done["changes"][0]["kind"] == "disk", f"{done}")
        eventually("the disk is there", lambda: len(self.cluster.command("group", "show", "shop")["disks"]) == 2)

    def refused(self):
        """A document of which something cannot be changes nothing, wherever in it that stands."""
        before, policies = self.revision(), self.cluster.command("policy", "list")
        for text, code, word in (
            ('[policy.a]\nrpo = "1s"\n[policy.gold]\nrpo = "1us"', 2, "rpo"),
            ('[policy.gold]\nrpo = "9s"\n[group.x]\npolicy = "none"\nsource = "source"\ntarget = "target"', 5, "none"),
            ('[policy.a]\n[group.x]\npolicy = "a"\nsource = "source"\ntarget = "target"\n[group.x.disk.d]\n'
             'path = "/none/there"', None, "none"),
            ('[policy.gold]\nrpo = "9s"\n[group.shop]\ntarget = "elsewhere"', 3, "elsewhere"),
            ('[policy.gold]\nrpo = "9s"\n[group.shop.disk.data]\npath = "/another"', 3, "/another"),
            ('[policy.gold]\nrpoo = "9s"', 2, "rpoo"),
        ):
            done = subprocess.run([AFTERIMAGE, "apply", "-f", "-", "--json", "--yes", "--identity", self.identity],
                                  input=text.encode(), capture_output=True, timeout=60, check=False)
            error = done.stderr.decode()
            expect(done.returncode not in (0, 7) and code in (None, done.returncode), f"{text}: {done.returncode} {error}")
            expect(word in error, error)
            now = self.cluster.command("policy", "list")
            expect(now == policies, f"{text}: has changed the policies to {now}")
        # One of them made a policy and took it back.
        expect(self.revision() == before + 2, f"{self.revision() - before} changes were made")

    def given_back(self, terminal, code):
        """The terminal is as it was, and what stood on it before is there again."""
        text = terminal.shows("before", f"ended with {code}", "icanon")
        expect("-icanon" not in text and "-echo " not in text and "GROUP" not in text, text)

    def top(self):
        """What is on the screen is so, at each size, after each key; the terminal is given back."""
        terminal = Terminal(self.folder, "top", "--identity", self.identity, "--interval", "200ms")
        try:
            text = terminal.shows("shop", "protected", "source > target", "2 of 2 proxies connected", "by health")
            expect("streaming" in text and "ms" in text, text)
            terminal.keys("n")
            terminal.shows("by name")
            terminal.keys("Enter")
            terminal.shows("durable", without=("FROM > TO",))
            terminal.keys("Escape")
            terminal.shows("FROM > TO")
            terminal.keys("?")
            terminal.shows("sort by condition, name")
            terminal.keys("?")
            terminal.resize(60, 14)
            terminal.shows("shop", without=("FROM > TO", "WRITES/S"))
            terminal.resize(150, 40)
            terminal.shows("FROM > TO", "shop")
            self.cluster.target.stop()
            terminal.shows("[target]", "target-unreachable", "1 of 2 proxies connected")
            self.cluster.target.start()
            terminal.shows("source > target", "2 of 2 proxies connected")
            self.cluster.coordinator.stop()
            terminal.shows("as it was", "shop")
            self.cluster.coordinator.start()
            terminal.shows("2 of 2 proxies connected", "shop", without=("as it was",))
            terminal.keys("q")
            self.given_back(terminal, 0)
        finally:
            terminal.close()
        terminal = Terminal(self.folder, "top", "--identity", self.identity)
        try:
            terminal.shows("shop", "protected")
            os.kill(terminal.pid(), signal.SIGTERM)
            self.given_back(terminal, 0)
        finally:
            terminal.close()
        terminal = Terminal(self.folder, "top", "--identity", self.identity, "--coordinator", f"127.0.0.1:{free_port()}")
        try:
            self.given_back(terminal, 4)
        finally:
            terminal.close()
        plain = command("top", "--identity", self.identity)[0]
        expect("shop" in plain and "\x1b" not in plain and all(len(line) <= 100 for line in plain.splitlines()), plain)
        document = json.loads(command("top", "--json", "--identity", self.identity)[0])
        expect([g["group"] for g in document["groups"] if g["group"] == "shop"] == ["shop"], f"{document}")

    def close(self):
        self.cluster.close()


def main():
    tests = Tests()
    with workspace("operators") as folder:
        pair = None

        def begin():
            nonlocal pair
            pair = Pair(folder)
        try:
            if tests.run("a pair, and an empty home", begin):
                for name, step in (
                    ("doctor looks at a host", pair.doctor_of_a_host),
                    ("doctor looks at each role", pair.doctor_of_roles),
                    ("doctor finds what is wrong", pair.doctor_finds),
                    ("init writes what each role starts with", pair.init),
                    ("top shows how things stand, and gives the terminal back", pair.top),
                    ("apply makes what a document says, once", pair.applied),
                    ("apply refuses all of a document or nothing", pair.refused),
                ):
                    tests.run(name, step)
        finally:
            if pair:
                pair.close()
    tests.end()


if __name__ == "__main__":
    main()
