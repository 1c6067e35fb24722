#!/usr/bin/python3
"""Every relative link in a document leads to a file, and to a heading where it names one."""

import pathlib
import re
import subprocess
import sys

root = pathlib.Path(__file__).resolve().parent.parent
names = subprocess.run(["git", "ls-files", "-z", "*.md"], cwd=root, capture_output=True, check=True).stdout
documents = [root / name for name in names.decode().split("\0") if name]
link = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
fence = re.compile(r"^```.*?^```", re.S | re.M)


def anchors(document):
    """The names that headings get, as GitHub makes them."""
    text = fence.sub("", document.read_text())
    found = set()
    for heading in re.findall(r"^#+ +(.*)$", text, re.M):
        plain = re.sub(r"[`*]|\[|\]\([^)]*\)", "", heading).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


broken = []
for document in documents:
    for to in link.findall(fence.sub("", document.read_text())):
        if re.match(r"[a-z]+:", to):
            continue
        path, _, anchor = to.partition("#")
        goal = (document.parent / path).resolve() if path else document
        if not goal.exists():
            broken.append(f"{document.relative_to(root)}: {to}: no such file")
        elif anchor and goal.suffix == ".md" and anchor not in anchors(goal):
            broken.append(f"{document.relative_to(root)}: {to}: no such heading")
print("\n".join(broken) if broken else f"{len(documents)} documents")
sys.exit(bool(broken))
