"""What the end-to-end tests share: processes of the product on loopback, and how results are said.

Every process is started here and stopped here, by its own handle. Each test prints `ok - name` or `not ok - name`.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
AFTERIMAGE = pathlib.Path(os.environ.get("AFTERIMAGE_PROGRAM", TARGET / "release" / "afterimage"))
MIB = 1 << 20


class Failed(Exception):
    """What was expected is not so."""


class Tests:
    """Counts and names."""

    def __init__(self):
        self.failed = 0

    def run(self, name, function, *args):
        """One test: it fails by any exception."""
        begun = time.monotonic()
        try:
            function(*args)
        except Exception as error:  # noqa: BLE001: any way to fail is a failure
            self.failed += 1
            trace = "" if isinstance(error, Failed) else traceback.format_exc()
            print(f"not ok - {name}\n{error}\n{trace}", flush=True)
            return False
        print(f"ok - {name} ({time.monotonic() - begun:.1f} s)", flush=True)
        return True

    def end(self):
        sys.exit(1 if self.failed else 0)


def expect(condition, message):
    if not condition:
        raise Failed(message)


def run(*command, timeout=120, **options):
    """A command that must succeed; its standard output."""
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, timeout=timeout, check=False, **options)
    if done.returncode != 0:
        raise Failed(f"{' '.join(command)}: exit code {done.returncode}\n"
                     f"{done.stdout.decode(errors='replace')[-2000:]}{done.stderr.decode(errors='replace')[-4000:]}")
    return done.stdout


def eventually(what, condition, timeout=30.0, pause=0.05):
    """Waits until the condition gives something true, and returns that."""
    limit = time.monotonic() + timeout
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > limit:
            raise Failed(f"not within {timeout} s: {what}")
        time.sleep(pause)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def random_file(path, size, seed):
    """Data of which about half compresses."""
    import random
    rng = random.Random(seed)
    with open(path, "wb") as out:
        while size > 0:
            part = min(size, 65536)
            half = part // 2
            out.write(rng.randbytes(half) + (b"after-image " * (part // 12 + 1))[:part - half])
            size -= part


class Process:
    """A process of the product, with its log in a file."""

    def __init__(self, folder, name, *args, env=None):
        self.name = name
        self.log = folder / f"{name}.log"
        self.args = [str(AFTERIMAGE), *map(str, args)]
        self.env = {**os.environ, **(env or {})}
        self.pass_fds = ()
        self.start()

    def start(self):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.args, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.env,
                                            pass_fds=self.pass_fds)

    def alive(self):
        return self.process.poll() is None

    def check(self):
        if not self.alive():
            raise Failed(f"{self.name} has ended with {self.process.returncode}:\n{self.tail()}")
        return True

    def tail(self, lines=30):
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def kill(self):
        """As a power switch does it to a process."""
        if self.alive():
            self.process.kill()
        self.process.wait()

    def stop(self):
        """As an operator does it. Returns the exit code."""
        if self.alive():
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.process.returncode


@contextlib.contextmanager
def workspace(name):
    """A folder for the time of the tests; kept when KEEP is set."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"afterimage-{name}-", dir=os.environ.get("TMPDIR", "/var/tmp")))
    try:
        yield folder
    finally:
        if os.environ.get("KEEP"):
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def connects(address):
    """True if something accepts there: a path or (host, port)."""
    kind = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
    with socket.socket(kind) as s:
        s.settimeout(1)
        try:
            s.connect(address)
            return True
        except OSError:
            return False


class Served:
    """One disk over NBD, unprotected."""

    def __init__(self, folder, name, size):
        self.image = folder / f"{name}.img"
        with open(self.image, "wb") as image:
            image.truncate(size)
        self.socket = folder / f"{name}.sock"
        self.port = free_port()
        self.export = name
        self.process = Process(folder, f"serve-{name}", "proxy", "--serve", f"{name}={self.image}",
                               "--nbd", f"unix:{self.socket}", "--nbd", f"tcp:127.0.0.1:{self.port}")
        eventually("the proxy listens", lambda: self.process.check() and connects(str(self.socket))
                   and connects(("127.0.0.1", self.port)))

    def unix(self, export=None):
        return f"nbd+unix:///{self.export if export is None else export}?socket={self.socket}"

    def tcp(self, export=None):
        return f"nbd://127.0.0.1:{self.port}/{self.export if export is None else export}"

    def close(self):
        return self.process.stop()


class Cluster:
    """A coordinator, a source and a target as separate processes, with certificates, and one group of disks."""

    GROUP = "shop"

    def __init__(self, folder, disks, retention="4h", cut_interval="200ms", stream_port=None, advertise=None,
                 journal=None, images=None, source_config="", source_args=(), target_args=(), options=None,
                 source_port=None, coordinator_args=()):
        """`source_port` is where the source finds the coordinator, if something stands between: given the coordinator's
        port, it says the other."""
        self.folder = folder
        self.disks = disks
        self.processes = []
        self.port = free_port()
        self.stream_port = stream_port or free_port()
        self.source_socket = folder / "source.sock"
        self.views_socket = folder / "views.sock"
        state = folder / "coordinator"
        self.coordinator = self.begin("coordinator", "coordinator", "--data-dir", state,
                                      "--listen", f"127.0.0.1:{self.port}", *coordinator_args)
        self.identity = state / "admin.json"
        eventually("the coordinator made an identity for the operator",
                   lambda: self.coordinator.check() and self.identity.exists())
        eventually("the coordinator answers", lambda: self.coordinator.check() and self.try_command("status"))
        self.target = self.proxy("target", "--journal", journal or folder / "journal", "--listen",
                                 f"127.0.0.1:{self.stream_port}", "--views", f"unix:{self.views_socket}",
                                 *(["--advertise", advertise] if advertise else []), *target_args)
        (folder / "source.toml").write_text(f"[source]\n{source_config}\n")
        self.source = self.proxy("source", "--nbd", f"unix:{self.source_socket}", "--config", folder / "source.toml",
                                 *source_args, port=source_port(self.port) if source_port else None)
        eventually("both proxies are connected", self.proxies_connected)
        self.command("policy", "create", "gold", "--retention", retention, "--cut-interval", cut_interval)
        arguments = []
        for name, size in disks.items():
            image = (images or {}).get(name, folder / f"{name}.img")
            if not image.exists():
                with open(image, "wb") as out:
                    out.truncate(size)
            arguments += ["--disk", f"{name}={image}{(options or {}).get(name, '')}"]
        self.command("group", "create", self.GROUP, "--policy", "gold", "--source", "source", "--target", "target",
                     *arguments)
        eventually("the group is protected", self.protected, timeout=60)

    def begin(self, name, *args, env=None):
        process = Process(self.folder, name, *args, env=env)
        self.processes.append(process)
        return process

    def proxy(self, name, *args, port=None):
        token = self.command("token", "create", name, "--role", "proxy")["token"]
        return self.begin(name, "proxy", "--name", name, "--coordinator", f"127.0.0.1:{port or self.port}", "--state",
                          self.folder / f"{name}-state", *args, env={"AFTERIMAGE_TOKEN": token})

    def command(self, *args, timeout=60):
        """An operator's command; its JSON."""
        out = run(AFTERIMAGE, *args, "--json", "--yes", "--identity", self.identity, timeout=timeout)
        return json.loads(out) if out.strip() else None

    def try_command(self, *args):
        try:
            return self.command(*args) or True
        except Failed:
            return None

    def proxies_connected(self):
        for process in self.processes:
            process.check()
        status = self.command("status")
        return sum(proxy["connected"] for proxy in status["proxies"]) == 2

    def status(self):
        return self.command("status", self.GROUP)["groups"][0]

    def protected(self):
        for process in self.processes:
            process.check()
        status = self.status()
        return status["phase"] == "protected" and status["sync"] is None and status

    def settle(self, timeout=60):
        """Waits until everything that was written before is durable at the target; the number of a point that has it.

        Reports of the two ends are of different moments: a cut, taken now, is what can be waited for."""
        # A coordinator that has just started may not have heard from the source yet.
        cut = eventually("the source takes a cut", lambda: self.try_command("point", "cut", self.GROUP, "--label", "settle"))
        eventually(f"record {cut['seq']} is durable at the target",
                   lambda: (self.protected() or {}).get("durable_seq", 0) >= cut["seq"], timeout)
        return cut["seq"]

    def uri(self, disk):
        """A source disk; a coordinator that has just started knows it once the proxy has reported."""
        def known():
            uris = [uri for entry in self.status()["disks"] if entry["disk"] == disk for uri in entry["uris"]]
            return next((uri for uri in uris if uri.startswith("nbd+unix")), None)
        return eventually(f"the status says where disk {disk} is", known)

    def open_view(self, name, point="latest", writable=False):
        """A view; URIs by disk."""
        view = self.command("view", "open", self.GROUP, name, "--to", point, *(["--writable"] if writable else []))
        return {export["disk"]: next(u for u in export["uris"] if u.startswith("nbd+unix")) for export in view["exports"]}

    def close_view(self, name):
        self.command("view", "close", self.GROUP, name)

    def replica_is_source(self):
        """The newest point, seen through a view, is what the source's disks hold. The host must be quiet."""
        seq = self.settle()
        view = self.open_view("compare")
        try:
            for disk in self.disks:
                same = [digest(uri) for uri in (self.uri(disk), view[disk])]
                expect(same[0] == same[1], f"disk {disk}: the newest point, at or after record {seq}, is not the source's content")
        finally:
            self.close_view("compare")

    def close(self):
        for process in reversed(self.processes):
            process.stop()


def digest(uri):
    """SHA-256 of a whole export."""
    with subprocess.Popen(["nbdcopy", uri, "-"], stdout=subprocess.PIPE) as copy:
        out = run("sha256sum", stdin=copy.stdout)
    expect(copy.returncode == 0, f"nbdcopy of {uri} failed")
    return out.split()[0]
