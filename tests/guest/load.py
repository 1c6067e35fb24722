"""Work that a guest does on its disks, of which somebody outside keeps the books.

Two kinds, one after the other without a pause: new files, each written and synced with its folder's entry, and slots of
one file that are overwritten again and again, each synced. After each sync the guest tells the witness. Whatever became
of the machine, what was told must be there: each file with its content, each slot with that number or a later one.
"""

import hashlib
import re
import time

from cluster import Failed, eventually, expect

SLOTS = 16

# $1: the folder. Numbers start again where a former life ended.
SCRIPT = """
mkdir -p {folder}/files; cd {folder}
[ -e slots ] || {{ dd if=/dev/zero of=slots bs=4096 count={slots} 2>/dev/null; sync slots; }}
n={first}
while :; do
    n=$((n + 1))
    seq $n $((n + 300 + n * 37 % 900)) | dd of=files/$n bs=65536 conv=fsync 2>/dev/null || {{ echo "failed file $n" >&9; exit 1; }}
    echo "file $n" >&9
    yes "slot $n" 2>/dev/null | dd bs=4096 count=1 iflag=fullblock of=slots seek=$((n % {slots})) conv=notrunc,fsync 2>/dev/null ||
        {{ echo "failed slot $n" >&9; exit 1; }}
    echo "slot $n" >&9
done
"""


def content(number):
    return b"".join(b"%d\n" % n for n in range(number, number + 300 + number * 37 % 900 + 1))


class Work:
    """The work on one mounted folder of a guest."""

    def __init__(self, guest, folder, name="work"):
        self.guest, self.folder, self.name = guest, folder, name
        guest.start(name, SCRIPT.format(folder=folder, slots=SLOTS, first=0))

    def told(self):
        return [line for _, line in list(self.guest.witnessed)]

    def count(self):
        told = self.told()
        failed = [line for line in told if line.startswith("failed")]
        if failed:
            raise Failed(f"the guest has seen an error: {failed}\n{self.guest.complaints()}")
        return len(told)

    def progress(self, steps=6, timeout=90):
        """Waits until it has gone on by so many syncs."""
        before = self.count()
        eventually(f"the guest has synced {steps} times more", lambda: self.count() >= before + steps, timeout)

    def stall(self):
        """The longest time between two syncs, in seconds, with the one that is being waited for."""
        times = [at for at, _ in list(self.guest.witnessed)] + [time.monotonic()]
        return max((b - a for a, b in zip(times, times[1:])), default=0.0)

    def books(self):
        """What must be there: numbers of files, and for each slot the last number."""
        files, slots = [], {}
        for line in self.told():
            # The last line may have been cut short with the power.
            found = re.fullmatch(r"(file|slot) (\d+)", line)
            if found and found.group(1) == "file":
                files.append(int(found.group(2)))
            elif found:
                slots[int(found.group(2)) % SLOTS] = int(found.group(2))
        return files, slots

    def check(self, other, folder):
        """Reads it all again in a machine that has the disk now; the number of files that were to be there."""
        files, slots = self.books()
        expect(files and slots, "the guest has told nothing")
        sums = other.do(f"cd {folder}/files; ls | xargs md5sum", timeout=240)
        found = {int(name): digest for digest, name in (line.split() for line in sums.splitlines())}
        missing = [n for n in files if n not in found]
        expect(not missing, f"of {len(files)} synced files these are gone: {missing[:20]}")
        wrong = [n for n in files if hashlib.md5(content(n)).hexdigest() != found[n]]
        expect(not wrong, f"of {len(files)} synced files these have another content: {wrong[:20]}")
        lines = other.do(f"cd {folder}; for n in $(seq 0 {SLOTS - 1}); do dd if=slots bs=4096 skip=$n count=1 2>/dev/null | "
                         f"tr '\\0' '-' | cut -c 1-40 | sort -u | tr '\\n' ','; echo; done").splitlines()
        last = max(files)
        for slot, number in slots.items():
            kinds = [k for k in lines[slot].split(",") if k]
            whole = [k for k in kinds if re.fullmatch(r"slot \d+", k)]
            # The block ends in the middle of a line.
            rest = [k for k in kinds if k not in whole]
            expect(len(whole) == 1 and all(whole[0].startswith(k) for k in rest), f"slot {slot} holds {kinds}")
            now = int(whole[0].split()[1])
            expect(number <= now <= last + 1 and now % SLOTS == slot, f"slot {slot}: {number} was synced, {now} is there")
        return len(files)
