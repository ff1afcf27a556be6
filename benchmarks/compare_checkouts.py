"""Whether two checkouts give the same calibration caches, plans and models.

    python benchmarks/compare_checkouts.py OLD NEW --quick
    python benchmarks/compare_checkouts.py OLD NEW --models resnet20_cifar10 --methods entropy

For each of OLD's benchmark configs and each calibration method both checkouts calibrate, plan, and
lower to `emulate` and `deploy`, each in a process of its own that imports `trtune` from that
checkout alone, with the packages of the Python that runs this. Rewrites of the FP32 model
(`calibration.prepare`), which only one of them may know, are off.

Models are compared by their bytes. Each scale of OLD's cache must stand in NEW's with its bytes;
NEW may know more tensors. Plans are compared without the reasons, which people read, and without
what only one of the checkouts writes. Ends with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("TRTUNE_DATA", HERE.parents[1] / "shared" / "data")).resolve()
QUICK = ("resnet20_cifar10", "mobilenetv2_cifar10", "squeezenet1.1_imagenet")
QUICK_PICTURES = 48
METHODS = ("entropy", "auto")
BACKENDS = "backends=[{name: onnxruntime}, {name: onnxruntime, lowering: deploy}]"
CACHE = "calibration.cache"
WORDS = frozenset({"reason", "reasons"})
WORKER = """
import json, sys
from pathlib import Path
import trtune

root, config, out, *overrides = sys.argv[1:]
assert Path(trtune.__file__).resolve().is_relative_to(Path(root)), trtune.__file__
if '"prepare"' in json.dumps(trtune.json_schema()["$defs"]["Calibration"]):
    overrides.append("calibration.prepare=none")
loaded = trtune.load_config(config, overrides=overrides)
infos = trtune.build(loaded, out=out)
print(json.dumps(str(trtune.run_folder(loaded, out))))
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a checkout made of one case: file -> its content, or why there is none."""

    files: Mapping[str, bytes]
    error: str = ""


def outcome(checkout: Path, config: Path, overrides: Sequence[str]) -> Outcome:
    """Calibrate, plan and lower in a process that imports `trtune` from `checkout`."""
    with tempfile.TemporaryDirectory() as work:
        root = Path(work, "root")
        root.mkdir()
        (root / "trtune").symlink_to(checkout / "trtune")  # and none of the bare folder names
        env = {**os.environ, "PYTHONPATH": str(root), "TRTUNE_DATA": str(DATA)}
        words = [str(checkout), str(config), str(Path(work, "runs")), *overrides]
        done = subprocess.run(
            [sys.executable, "-c", WORKER, *words],
            cwd=work,
            env=env,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = done.stderr.strip().splitlines() or ["no message"]
            return Outcome({}, last[-1])
        folder = Path(json.loads(done.stdout.splitlines()[-1]))
        found = [folder / CACHE, folder / "plan.json", *folder.glob("*/model.onnx")]
        return Outcome({p.relative_to(folder).as_posix(): p.read_bytes() for p in found
                        if p.is_file()})  # fmt: skip


def shared_parts(a: Any, b: Any) -> tuple[Any, Any]:
    """Both values without the keys that only one has, and without the words for people."""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = {k: shared_parts(a[k], b[k]) for k in a if k in b and k not in WORDS}
        return {k: p[0] for k, p in pairs.items()}, {k: p[1] for k, p in pairs.items()}
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        items = [shared_parts(x, y) for x, y in zip(a, b, strict=True)]
        return [x for x, _ in items], [y for _, y in items]
    return a, b


def same_plan(a: bytes, b: bytes) -> bool:
    """Whether two plan.json say the same of every node."""
    before, after = json.loads(a), json.loads(b)
    nodes = [set(plan.get("nodes", plan.get("assignments", {}))) for plan in (before, after)]
    left, right = shared_parts(before, after)
    return nodes[0] == nodes[1] and left == right


def cache_differences(a: bytes, b: bytes) -> list[str]:
    """The lines of `a`, header or scale, that are not in `b` as they are."""
    new = set(b.splitlines())
    return [line.decode() for line in a.splitlines() if line not in new]


def differences(old: Outcome, new: Outcome) -> Iterator[str]:
    """What differs, file by file; the same failure on both sides is no difference."""
    if old.error or new.error:
        if old.error != new.error:
            yield f"OLD: {old.error or 'works'}; NEW: {new.error or 'works'}"
        return
    for name in sorted({*old.files, *new.files}):
        a, b = old.files.get(name), new.files.get(name)
        if a is None or b is None:
            yield f"{name}: only in {'NEW' if a is None else 'OLD'}"
        elif name == CACHE:
            if moved := cache_differences(a, b):
                yield f"{name}: {len(moved)} lines are not in NEW, such as {moved[0]!r}"
        elif not (same_plan(a, b) if name == "plan.json" else a == b):
            yield f"{name}: {_short(a)} -> {_short(b)}"


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def cases(options: argparse.Namespace) -> Iterator[tuple[Path, str, list[str]]]:
    """Config, method and overrides of everything to compare."""
    for config in sorted((options.old / "benchmarks" / "configs").glob("*.yaml")):
        if options.models and config.stem not in options.models:
            continue
        take = [f"data.calibration.take={options.take}"] if options.take else []
        for method in options.methods:
            yield config, method, [BACKENDS, f"calibration.method={method}", *take]


def main() -> int:
    """Compare, and print a row a case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}; few pictures")
    parser.add_argument("--models", nargs="+", help="names of benchmark configs; default: all")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--take", type=int, help="calibration pictures; default: the config's")
    options = parser.parse_args()
    options.old, options.new = options.old.resolve(), options.new.resolve()
    if options.quick:
        options.models = options.models or QUICK
        options.take = options.take or QUICK_PICTURES
    differ = 0
    print("| model | method | files | |\n|---|---|---|---|", flush=True)
    for config, method, overrides in cases(options):
        old = outcome(options.old, config, overrides)
        new = outcome(options.new, config, overrides)
        found = list(differences(old, new))
        differ += bool(found)
        said = "; ".join(found) or (f"both: {old.error}" if old.error else "the same")
        print(f"| {config.stem} | {method} | {len(new.files)} | {said} |", flush=True)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
