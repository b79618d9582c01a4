"""A mix in a process of its own: by how much it grew at the peak, and by how much it was to grow.

python memory_worker.py ARGUMENTS OF btx mix, without "mix" -> JSON on the last line
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from llamas import run_btx


def status(key: str) -> int:
    """Bytes that /proc/self/status gives."""
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def main() -> None:
    arguments = sys.argv[1:]
    code, out, err = run_btx("mix", *arguments, "--dry-run")
    assert code == 0, err
    (announced,) = re.findall(r"^memory +([\d,]+) bytes", out, re.MULTILINE)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = status("VmRSS")
    code, _, err = run_btx("mix", *arguments)
    assert code == 0, err
    grown = status("VmHWM") - before
    print(json.dumps({"announced": int(announced.replace(",", "")), "grown": grown}))


if __name__ == "__main__":
    main()
