#!/usr/bin/python3
"""What a guest's requests cost whoever serves them by vhost-user-blk: our proxy, unprotected, beside qemu-storage-daemon, in one
guest, on two files of one file system. Prints the ratio of requests per CPU second of the server's process, by queue depth, and
how often the proxy's data thread wakes up while the guest is idle.

A guest without KVM spends most of its time in QEMU: rates say little, the server's CPU time does. Needs what `tests/guests.py`
needs. Arguments: rounds (3), seconds of each run (5).
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

from cluster import MIB, eventually, workspace
from guest import Guest, Image

SIZE = 64 * MIB
BINARY = pathlib.Path(os.environ.get("AFTERIMAGE", "target/release/afterimage")).resolve()


def cpu_seconds(pid):
    """Of all threads, by the scheduler's own count."""
    total = 0
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def wakes(pid, name):
    """How often the threads of that name went to sleep."""
    total = 0
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text().startswith(name):
            lines = (task / "status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
    return total


def load(guest, disk, pid, depth, seconds):
    """Requests, and seconds of the server's CPU, of one run."""
    before = cpu_seconds(pid)
    text = guest.do(f"fio --name=c --filename={guest.block(disk)} --rw=randrw --bs=4k --iodepth={depth} --ioengine=libaio "
                    f"--direct=1 --time_based --runtime={seconds} --output-format=json", timeout=120)
    spent = cpu_seconds(pid) - before
    job = json.loads(text[text.index("{"):])["jobs"][0]
    return job["read"]["total_ios"] + job["write"]["total_ios"], spent


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    seconds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    with workspace("vhost-cost") as folder:
        for name in ("ours", "peer"):
            with open(folder / f"{name}.img", "wb") as out:
                out.write(os.urandom(MIB) * (SIZE // MIB))
        sockets = {"ours": folder / "vhost" / "ours.sock", "peer": folder / "peer.sock"}
        servers = {
            "ours": subprocess.Popen([BINARY, "proxy", "--serve", f"ours={folder / 'ours.img'}", "--vhost-user",
                                      folder / "vhost"], stderr=subprocess.DEVNULL),
            "peer": subprocess.Popen([
                "qemu-storage-daemon", "--blockdev",
                f"driver=file,node-name=peer,filename={folder / 'peer.img'},cache.direct=on,aio=io_uring", "--export",
                f"type=vhost-user-blk,id=peer,node-name=peer,addr.type=unix,addr.path={sockets['peer']},writable=on"]),
        }
        guest = Guest(folder, Image(), "cost", tools=True)
        for name, path in sockets.items():
            guest.vhost_user(name, path, reconnect=0)
        try:
            for path in sockets.values():
                eventually("the server listens", path.exists)
            guest.boot()
            pids = {name: server.pid for name, server in servers.items()}
            for depth in (1, 32):
                each = {"ours": [], "peer": []}
                for _ in range(rounds):
                    for name in each:
                        count, spent = load(guest, name, pids[name], depth, seconds)
                        each[name].append(count / spent)
                ratios = sorted(ours / peer for ours, peer in zip(each["ours"], each["peer"]))
                print(f"depth {depth}: requests per CPU second, ours over qemu-storage-daemon's: "
                      f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}–{ratios[-1]:.2f}]", flush=True)
            time.sleep(2)
            before = wakes(pids["ours"], "data-")
            time.sleep(10)
            print(f"idle: {(wakes(pids['ours'], 'data-') - before) / 10:.1f} wake-ups of the data thread a second")
            guest.shutdown()
        finally:
            guest.close()
            for server in servers.values():
                server.kill()
                server.wait()


main()
