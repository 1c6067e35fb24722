#!/usr/bin/python3
"""Machines that failovers start and stop, with real processes: by the operator's commands, by a proxy elsewhere that cuts the
power of a dead site, and as guests of QEMU's that outlive their proxy.

Needs libnbd-bin, python3-libnbd; for guests qemu-system-x86, busybox-static, zstd, e2fsprogs, fio (see tests/guest).
Arguments: parts of names of the tests to run.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import time

import nbd

from cluster import AFTERIMAGE, MIB, Cluster, Tests, digest, eventually, expect, free_port, workspace

# A machine that is a process: it counts upwards in the first block of its first disk, durably, and notes what was answered.
FAKE = r"""#!/usr/bin/python3
import json, os, pathlib, signal, subprocess, sys, time
home = pathlib.Path(__file__).resolve().parent
action, said = sys.argv[1], json.load(sys.stdin)
name = f"{said['role']}-{said['instance']}"
pid, told = home / f"{name}.pid", home / f"{name}.answered"
with open(home / "told", "a") as out:
    out.write(f"{action} {name}\n")
if (home / f"fail-{action}").exists():
    print((home / f"fail-{action}").read_text(), file=sys.stderr)
    sys.exit(1)

def runs():
    try:
        number = int(pid.read_text())
        os.kill(number, 0)
        return pathlib.Path(f"/proc/{number}/stat").read_text().split(") ")[1][0] != "Z"
    except (OSError, ValueError):
        return False

if action == "start" and not runs():
    uri = next(u for u in said["disks"][0]["uris"] if u.startswith("nbd+unix"))
    code = "import count, sys; count.forever(*sys.argv[1:])"
    started = subprocess.Popen([sys.executable, "-c", code, uri, told], cwd=home, stdin=subprocess.DEVNULL,
                               start_new_session=True)
    pid.write_text(str(started.pid))
if action == "stop" and runs():
    os.kill(int(pid.read_text()), signal.SIGTERM)
    for _ in range(int(said["within_ms"]) // 10 + 100):
        if not runs():
            break
        time.sleep(0.01)
if action == "ready":
    sys.exit(0 if told.exists() else 3)
sys.exit(0 if runs() == (action != "stop") else 3)
"""
COUNT = r"""
import pathlib, time, nbd
def forever(uri, told):
    def connected():
        while True:
            try:
                handle = nbd.NBD()
                handle.connect_uri(uri)
                return handle
            except nbd.Error:
                time.sleep(0.05)
    handle = connected()
    number = int.from_bytes(bytes(handle.pread(8, 0)), "little")
    while True:
        number += 1
        while True:
            try:
                handle.pwrite(number.to_bytes(8, "little") * 512, 0, nbd.CMD_FLAG_FUA)
                break
            except nbd.Error:
                handle = connected()  # As a guest waits for its disk.
        pathlib.Path(told).write_text(str(number))
        time.sleep(0.002)
"""


class Fake:
    """Commands of an operator's, and what they have been told."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        (folder / "count.py").write_text(COUNT)
        self.script = folder / "fake"
        self.script.write_text(FAKE)
        self.script.chmod(0o755)

    def config(self, name="default"):
        command = lambda action: f"{action} = ['{self.script}', '{action}']"  # noqa: E731
        return f"hook.{name} = {{ {', '.join(command(a) for a in ('start', 'stop', 'probe', 'ready'))} }}\n"

    def answered(self, name):
        path = self.folder / f"{name}.answered"
        text = path.read_text() if path.exists() else ""
        return int(text or 0)

    def told(self):
        path = self.folder / "told"
        return path.read_text().splitlines() if path.exists() else []

    def fails(self, action, why):
        (self.folder / f"fail-{action}").write_text(why)

    def obeys(self, action):
        (self.folder / f"fail-{action}").unlink()

    def start(self, name, uri):
        """As somebody started it before there was a failover."""
        said = {"role": "source", "instance": name, "disks": [{"uris": [uri]}]}
        subprocess.run([self.script, "start"], input=json.dumps(said).encode(), check=True, timeout=20)

    def stop(self, name):
        """As somebody stops it by hand."""
        role, instance = name.split("-", 1)
        said = {"role": role, "instance": instance, "within_ms": 5000}
        subprocess.run([self.script, "stop"], input=json.dumps(said).encode(), check=True, timeout=20)

    def runs(self, name):
        role, instance = name.split("-", 1)
        done = subprocess.run([self.script, "probe"], input=json.dumps({"role": role, "instance": instance}).encode(),
                              check=False, timeout=20)
        return done.returncode == 0

    def close(self):
        for path in self.folder.glob("*.pid"):
            try:
                os.kill(int(path.read_text()), 9)
            except (OSError, ValueError):
                pass


def newest(uri):
    handle = nbd.NBD()
    handle.connect_uri(uri)
    found = int.from_bytes(bytes(handle.pread(8, 0)), "little")
    handle.shutdown()
    return found


def states(operation):
    return {step["step"]: step["state"] for step in operation["steps"]}


def fails(cluster, *args, code=1):
    """A command that must fail; what it says."""
    done = subprocess.run([AFTERIMAGE, *args, "--json", "--yes", "--identity", cluster.identity], capture_output=True,
                          timeout=120, check=False)
    expect(done.returncode == code, f"{args}: exit code {done.returncode}\n{done.stdout.decode()}{done.stderr.decode()}")
    return (done.stdout + done.stderr).decode()


def settings(folder, name, text):
    path = folder / f"{name}.toml"
    path.write_text(f"[machines]\n{text}")
    return path


def commands(folder):
    """A machine that is a process goes over and comes back: nothing that it was answered is missing at either place, it never
    runs twice, and a coordinator and a proxy that are killed in the middle change nothing of that."""
    here, there = Fake(folder / "here"), Fake(folder / "there")
    cluster = Cluster(folder, {"data": 32 * MIB}, source_config=f"[machines]\n{here.config()}",
                      target_args=("--config", settings(folder, "target", there.config("dr"))))
    try:
        made = cluster.command("machine", "create", "web", "--group", cluster.GROUP, "--source", "hook", "--source-name",
                               "web01", "--target", "hook:dr", "--ready", "hook:dr", "--stop-within", "5s")
        expect(made["source"]["called"] == "web01" and made["target"]["profile"] == "dr", made)
        here.start("web01", cluster.uri("data"))
        eventually("it counts", lambda: here.answered("source-web01") > 50)
        probed = cluster.command("machine", "probe", "web")
        expect((probed["source"]["power"], probed["target"]["power"]) == ("on", "off"), probed)

        # One that cannot be started there runs on here.
        there.fails("start", "no room")
        text = fails(cluster, "failover", "planned", cluster.GROUP)
        expect("start-replica" in text and "no room" in text, text)
        expect(here.runs("source-web01") and not there.runs("replica-web"), here.told() + there.told())
        there.obeys("start")
        eventually("the group is protected again", cluster.protected, timeout=60)
        before = here.answered("source-web01")
        eventually("it counts on", lambda: here.answered("source-web01") > before)

        started = cluster.command("failover", "planned", cluster.GROUP, "--no-wait")
        cluster.coordinator.kill()
        cluster.coordinator.start()
        eventually("the coordinator is back", lambda: cluster.try_command("status"))
        over = cluster.command("failover", "wait", started["operation"])
        expect(over["state"] == "done" and set(states(over).values()) == {"done"}, over["steps"])
        answered = here.answered("source-web01")
        expect(not here.runs("source-web01"), "it runs at both sites")
        eventually("it counts at the target", lambda: there.answered("replica-web") > answered)
        machine = cluster.command("machine", "show", "web")
        expect(machine["stopped_at_source"] and machine["runs_from"] == "failover", machine)
        text = fails(cluster, "machine", "delete", "web", code=3)
        expect("undo the failover" in text, text)

        # Another point, by the same machine; then back. A target proxy that restarts meanwhile is asked again.
        point = over["result"]["point"]["seq"] - 20
        changed = cluster.command("failover", "change-point", cluster.GROUP, "--to", f"seq:{point}")
        expect(states(changed)["stop-replica"] == states(changed)["await-replica"] == "done", changed["steps"])
        expect(there.runs("replica-web"), there.told())
        expect(cluster.command("machine", "show", "web")["runs_from"] == "failover-2", "it runs from another view")
        undo = cluster.command("failover", "undo", cluster.GROUP)
        expect(states(undo)["start-source"] == "done", undo["steps"])
        expect(here.runs("source-web01") and not there.runs("replica-web"), undo["steps"])
        eventually("it counts on at its source", lambda: here.answered("source-web01") > answered)
        expect(newest(cluster.uri("data")) > answered, "what was answered is missing")
        machine = cluster.command("machine", "show", "web")
        expect(not machine["stopped_at_source"] and machine["runs_from"] is None, machine)

        # A replica that runs and does not answer is left running, and said.
        cluster.command("machine", "update", "web", "--ready", "tcp:127.0.0.1:1", "--ready-within", "1s")
        eventually("the group is protected again", cluster.protected, timeout=60)
        text = fails(cluster, "failover", "planned", cluster.GROUP)
        expect("does not answer" in text and there.runs("replica-web"), text)
        expect(cluster.status()["phase"] == "failed-over", "it is not taken back")
        cluster.command("failover", "undo", cluster.GROUP)
    finally:
        cluster.close()
        here.close()
        there.close()


def home(folder):
    """A failback takes the machine home and back: stopped at one place before it is started at the other, whoever dies; where it
    does not start at home, the replica runs again, with all that it was answered."""
    here, there = Fake(folder / "here"), Fake(folder / "there")
    source_args = ("--journal", folder / "source-journal", "--listen", f"127.0.0.1:{free_port()}", "--views",
                   f"unix:{folder}/back.sock")
    cluster = Cluster(folder, {"data": 32 * MIB}, source_config=f"[machines]\n{here.config()}", source_args=source_args,
                      target_args=("--config", settings(folder, "target", there.config("dr"))))
    web, replica = "source-web", "replica-web"
    phase = lambda: cluster.status()["phase"]  # noqa: E731
    failback = lambda *args: cluster.command("failback", args[0], cluster.GROUP, *args[1:], timeout=120)  # noqa: E731

    def ready():
        failback("start")
        eventually("the failback is ready to switch",
                   lambda: (reverse := failback("status")["reverse"]) and reverse["ready"], timeout=120)

    def runs(one, other, host):
        answered = max(here.answered(web), there.answered(replica))
        expect(not other[0].runs(other[1]), f"it runs at both sites: {here.told()} {there.told()}")
        eventually("it counts on", lambda: one[0].answered(one[1]) > answered)
        expect(newest(host) > answered, f"{answered} was answered, and is not there")

    at_source, at_target = (here, web), (there, replica)
    try:
        cluster.command("machine", "create", "web", "--group", cluster.GROUP, "--source", "hook", "--target", "hook:dr",
                        "--ready", "hook:dr", "--stop-within", "5s")
        disk = cluster.uri("data")
        here.start("web", disk)
        eventually("it counts", lambda: here.answered(web) > 50)
        over = cluster.command("failover", "planned", cluster.GROUP)
        [export] = over["result"]["view"]["exports"]
        view = next(u for u in export["uris"] if u.startswith("nbd+unix"))
        runs(at_target, at_source, view)

        # One that does not start at home runs on where it was.
        ready()
        here.fails("start", "no room at home")
        text = fails(cluster, "failback", "switch", cluster.GROUP)
        expect("start-source" in text and "no room at home" in text, text)
        expect(phase() == "failed-over", text)
        runs(at_target, at_source, view)
        here.obeys("start")

        # Home, with the coordinator killed in the middle.
        eventually("another failback can begin", lambda: cluster.try_command("failback", "start", cluster.GROUP), 60)
        eventually("the failback is ready to switch",
                   lambda: (reverse := failback("status")["reverse"]) and reverse["ready"], timeout=120)
        started = failback("switch", "--no-wait")
        cluster.coordinator.kill()
        cluster.coordinator.start()
        eventually("the coordinator is back", lambda: cluster.try_command("status"))
        done = cluster.command("failover", "wait", started["operation"], timeout=180)
        expect(done["state"] == "done" and states(done)["stop-replica"] == states(done)["await-source"] == "done", done)
        expect(phase() == "failed-back", done)
        runs(at_source, at_target, disk)
        machine = cluster.command("machine", "show", "web")
        expect(not machine["stopped_at_source"] and machine["runs_from"] is None, machine)

        # And there again, as it was left.
        undone = failback("undo")
        expect(states(undone)["stop-source"] == states(undone)["await-replica"] == "done", undone["steps"])
        runs(at_target, at_source, view)

        # Home for good; what is still on there, held since then, has a past in its memory.
        ready()
        here.start("web", disk)
        switched = failback("switch")
        expect(states(switched)["stop-source"] == "done", switched["steps"])
        runs(at_source, at_target, disk)
        eventually("the failback is committed", lambda: cluster.try_command("failback", "commit", cluster.GROUP), 120, 0.5)
        expect(here.runs(web), "a commitment stops the machine")
    finally:
        cluster.close()
        here.close()
        there.close()


def power(folder):
    """With the source's site gone its proxy confirms nothing; whoever cuts the machine's power does, or does not."""
    fake = Fake(folder / "ipmi")
    cluster = Cluster(folder, {"data": 8 * MIB}, target_args=("--config", settings(folder, "target", fake.config("ipmi"))))
    try:
        cluster.command("machine", "create", "web", "--group", cluster.GROUP, "--source", "hook:ipmi", "--source-proxy",
                        "target")
        fake.start("web", cluster.uri("data"))
        eventually("it counts", lambda: fake.answered("source-web") > 20)
        cluster.settle()
        cluster.source.kill()
        eventually("the source is missed", lambda: not all(p["connected"] for p in cluster.command("status")["proxies"]))
        fake.fails("stop", "the switch does not answer")
        text = fails(cluster, "failover", "start", cluster.GROUP, "--to", "latest")
        expect("power-off" in text and "the switch does not answer" in text, text)
        fake.obeys("stop")
        over = cluster.command("failover", "start", cluster.GROUP, "--to", "latest")
        expect(over["result"]["fence"] == "confirmed" and states(over)["power-off"] == "done", over)
        expect(not fake.runs("source-web"), "its power was not cut")
    finally:
        cluster.close()
        fake.close()


INIT = """#!/bin/busybox sh
export PATH=/sbin:/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in $(cat /modules/virtio_blk.order); do insmod /modules/$module.ko; done
for try in $(seq 200); do [ -b /dev/vda ] && break; usleep 50000; done
mkdir -p /mnt/d; mount -t ext4 /dev/vda /mnt/d || mount /dev/vda /mnt/d
echo "answers: $(cat /mnt/d/token)" >/dev/ttyS0
while true; do n=$((n + 1)); echo $n >/mnt/d/count; sync; echo "wrote $n" >/dev/ttyS0; usleep 200000; done
"""


def guest(folder):
    """A real guest starts from its replica, goes on while its proxy is killed and comes back, and is gone with the undoing."""
    from guest import Image
    image = Image()
    initrd = image.begun_by(INIT, folder / "initrd")
    token = f"{random.getrandbits(64):x}"
    content = folder / "content"
    content.mkdir()
    (content / "token").write_text(token)
    disk = folder / "data.img"
    with open(disk, "wb") as out:
        out.truncate(24 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-d", content, disk], check=True, timeout=60)
    options = "console=ttyS0 panic=-1 quiet no_timer_check tsc=reliable mitigations=off nokaslr random.trust_cpu=on"
    arguments = ["-cpu", "max", "-kernel", str(image.kernel), "-initrd", str(initrd), "-append", options]
    qemu = f"qemu.default = {{ accelerators = ['tcg,thread=multi'], arguments = {json.dumps(arguments)} }}\n"
    cluster = Cluster(folder, {"data": 0}, images={"data": disk},
                      target_args=("--config", settings(folder, "target", qemu)))
    serial = folder / "target-state/machines/qemu/web/serial.log"
    said = lambda: serial.read_text(errors="replace")  # noqa: E731
    count = lambda: max([int(line.split()[1]) for line in said().splitlines() if line.startswith("wrote ")] or [0])  # noqa: E731
    try:
        cluster.command("machine", "create", "web", "--group", cluster.GROUP, "--target", "qemu", "--memory", "384MiB",
                        "--nic", "lan", "--ready", f"console:answers: {token}", "--ready-within", "2m", "--stop-within", "0s")
        cluster.settle()
        text = fails(cluster, "failover", "planned", cluster.GROUP, code=3)
        expect("lan" in text and "machines.network.lan" in text, text)
        cluster.command("machine", "update", "web", "--nic", "")
        trial(cluster, folder, token)
        begun = time.monotonic()
        over = cluster.command("failover", "planned", cluster.GROUP, timeout=180)
        expect(states(over)["await-replica"] == "done", over["steps"])
        print(f"  from the verb to its first answer {time.monotonic() - begun:.1f} s, in emulation")
        cluster.target.kill()
        cluster.target.start()
        eventually("the proxy is back", lambda: any(p["connected"] for p in cluster.command("status")["proxies"]))
        eventually("it is found again", lambda: cluster.command("machine", "probe", "web")["target"]["power"] == "on")
        now = count()
        eventually("it writes on", lambda: count() > now + 2, timeout=60)
        expect(said().count("answers:") == 1, "it was started twice")
        pid = int((serial.parent / "pid").read_text())
        undo = cluster.command("failover", "undo", cluster.GROUP, timeout=120)
        expect(states(undo)["stop-replica"] == "done", undo["steps"])
        expect(not alive(pid), "its process is still there")
    finally:
        kill_left(serial.parent)
        cluster.close()


def trial(cluster, folder, token):
    """A test starts a guest beside what is protected, and leaves nothing behind: not when it answers, not when it does not, and
    not when the coordinator is killed while it is being looked at."""
    before = digest(cluster.uri("data"))
    instances = folder / "target-state/machines/qemu"
    nothing = lambda: not cluster.command("view", "list", cluster.GROUP)["views"] and not any(instances.glob("web.test-*"))  # noqa: E731
    cluster.command("machine", "update", "web", "--nic", "lan")
    tested = cluster.command("failover", "test", cluster.GROUP, timeout=180)
    expect(set(states(tested).values()) == {"done"} and "stop-test" in states(tested), tested["steps"])
    expect(nothing(), "something of the test is left")
    text = fails(cluster, "failover", "test", cluster.GROUP, "--ready", "console:never said", "--ready-within", "8s")
    expect("await-test" in text and "has not said" in text, text)
    expect(nothing(), "something of a test that failed is left")

    held = cluster.command("failover", "test", cluster.GROUP, "--hold", "10m", "--no-wait")
    eventually("it is held", lambda: states(cluster.command("failover", "show", held["operation"]))["hold"] == "running", 120)
    [folder] = instances.glob("web.test-*")
    line = pathlib.Path(f"/proc/{int((folder / 'pid').read_text())}/cmdline").read_bytes()
    expect(b"user,restrict=on" in line, "a test with a way out")
    expect(token in (folder / "serial.log").read_text(errors="replace"), "it does not run from the point")
    cluster.coordinator.kill()
    cluster.coordinator.start()
    eventually("the coordinator is back", lambda: cluster.try_command("status"))
    expect(states(cluster.command("failover", "show", held["operation"]))["hold"] == "running", "it does not go on")
    cluster.target.kill()
    cluster.target.start()
    ended = cluster.command("failover", "cancel", held["operation"], timeout=90)
    expect(ended["state"] == "done" and set(states(ended).values()) == {"done"}, ended["steps"])
    expect(nothing(), "something of a test that was ended is left")
    eventually("the group is protected", cluster.protected, timeout=60)
    expect(digest(cluster.uri("data")) == before, "a test has written to the source")
    cluster.replica_is_source()
    cluster.command("machine", "update", "web", "--nic", "")


def alive(pid):
    """A process that is more than an entry: whoever is to take note of its end may be slow."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


def kill_left(folder):
    """What a test that failed leaves behind."""
    try:
        pid = int((folder / "pid").read_text())
        if str(folder).encode() in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, 9)
    except (OSError, ValueError):
        pass


TESTS = {
    "by commands, there and back": commands,
    "home by a failback, and back": home,
    "the power of a dead site": power,
    "a guest that outlives its proxy": guest,
}


def main():
    os.environ.setdefault("LC_ALL", "C")
    tests = Tests()
    for name, test in TESTS.items():
        if sys.argv[1:] and not any(part in name for part in sys.argv[1:]):
            continue
        with workspace("machines") as folder:
            tests.run(f"machines: {name}", test, folder)
    tests.end()


if __name__ == "__main__":
    main()
