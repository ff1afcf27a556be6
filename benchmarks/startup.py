"""How long the package takes before it does anything: `import trtune`, `trtune --help`, and others.

    python benchmarks/startup.py --runs 15

Each in a process of its own, beside a Python that imports nothing; medians. Processor time is that
of the child, user and system together: it is what a busy machine does not change much. `--check`
ends with 1 if `import trtune` or `trtune --help` takes longer than is promised, for a quiet
machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import trtune": ["-c", "import trtune"],
    "trtune --version": ["-m", "trtune", "--version"],
    "trtune --help": ["-m", "trtune", "--help"],
    "trtune run --help": ["-m", "trtune", "run", "--help"],
    "trtune schema": ["-m", "trtune", "schema"],
    "trtune.load_config": ["-c", "import trtune; trtune.load_config"],
    "trtune.run": ["-c", "import trtune; trtune.run; import trtune.run.pipeline"],
}
PROMISED = {"import trtune": 0.15, "trtune --help": 0.4}


def once(arguments: Sequence[str], folder: str) -> tuple[float, float]:
    """Wall-clock and processor seconds of a Python process with `arguments`."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, os.times()
    user = after.children_user - before.children_user
    return wall, user + after.children_system - before.children_system


def measure(runs: int) -> dict[str, tuple[float, float]]:
    """Command -> medians of wall-clock and processor seconds; the commands take turns."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for arguments in COMMANDS.values():
            once(arguments, folder)  # writes the byte code, and fills the file system's cache
        for _ in range(runs):
            for name, arguments in COMMANDS.items():
                found[name].append(once(arguments, folder))
    return {
        name: (statistics.median(w for w, _ in times), statistics.median(c for _, c in times))
        for name, times in found.items()
    }


def main() -> int:
    """Print a table; with `--check`, judge it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=9, help="processes of each kind")
    parser.add_argument("--check", action="store_true", help="end with 1 if a promise is broken")
    options = parser.parse_args()
    found = measure(options.runs)
    print("| | wall-clock, s | processor, s | promised, s |\n|---|---|---|---|")
    for name, (wall, processor) in found.items():
        print(f"| {name} | {wall:.3f} | {processor:.3f} | {PROMISED.get(name, '')} |")
    late = [name for name, limit in PROMISED.items() if found[name][0] > limit]
    for name in late:
        print(f"{name} takes {found[name][0]:.3f} s, more than {PROMISED[name]}", file=sys.stderr)
    return 1 if options.check and late else 0


if __name__ == "__main__":
    sys.exit(main())
