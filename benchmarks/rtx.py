#!/usr/bin/env python3
"""What NVIDIA's own compiler makes of the plans: TensorRT-RTX engines, built without a GPU.

    python benchmarks/rtx.py                     every model and precision, for an 8.9 GPU
    python benchmarks/rtx.py --only vit --capability 12.0

Each row is one engine of `trtune build`: what was planned for the nodes with weights, what the
compiler's log says that they run in, and every node that it did not do as planned. With "and pins"
every fourth of these nodes is pinned to FP32. The data is found through TRTUNE_DATA, or beside the
checkout. Writes `results/rtx.md`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import trtune
from trtune.precision.graph.file import load_model
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.plan.rules import make_plan

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("TRTUNE_DATA", HERE.parents[1] / "shared" / "data"))
FLOAT = (
    *("resnet20_cifar10", "mobilenetv2_cifar10", "efficientnet_b0_cifar10", "vit_cifar10"),
    *("mobilenetv2_imagenet", "squeezenet1.1_imagenet", "yolox_nano_coco"),
)
QAT = ("resnet20_cifar10_qat", "mobilenetv2_cifar10_qat", "mobilenetv2_imagenet_qat_uint8")
PRECISIONS = {
    "INT8": (),
    "INT8 and pins": (),
    "INT8 with FP16 around it": ("precision.fallback=fp16",),
    "FP16": ("precision.default=fp16",),
    "FP8": ("precision.default=fp8",),
    "INT8, FP8 and FP16": ("precision.fallback=fp16",),
}
HEADER = ("model", "asked for", "planned", "in the compiler's account", "not as planned", "MB", "s")


def pins_of(path: Path) -> str:
    """Every fourth node with weights, pinned to fp32."""
    plan = make_plan(GraphView.of(load_model(path)))
    return "{" + ", ".join(f"'{name}': fp32" for name in plan.int8_nodes[::4]) + "}"


def three_of(path: Path) -> str:
    """A third of the nodes with weights pinned to fp8, a third to fp16."""
    nodes = make_plan(GraphView.of(load_model(path))).int8_nodes
    pins = dict.fromkeys(nodes[1::3], "fp8") | dict.fromkeys(nodes[2::3], "fp16")
    return "{" + ", ".join(f"'{name}': {precision}" for name, precision in pins.items()) + "}"


def row_of(name: str, asked: str, capability: str, out: Path) -> tuple[str, ...]:
    """Build one engine; the cells of its row."""
    overrides = [
        f"backends=[{{name: tensorrt_rtx, compute_capabilities: ['{capability}']}}]",
        "precision.target=null",
        *PRECISIONS.get(asked, ()),
        *([] if name in QAT else ["calibration.method=entropy"]),
    ]
    path = HERE / "configs" / f"{name}.yaml"
    config = trtune.load_config(path, overrides=overrides)
    pinned = {"INT8 and pins": pins_of, "INT8, FP8 and FP16": three_of}.get(asked)
    if pinned is not None:
        pins = pinned(Path(config.model.path))
        config = trtune.load_config(path, overrides=[*overrides, f"precision.pin={pins}"])
    (info,) = trtune.build(config, out=out)
    written = trtune.run_folder(config, out) / "plan.json"
    planned = PrecisionPlan.from_json(written.read_text(encoding="utf-8"))
    found = Counter(info.precisions.get(node, "unknown") for node in planned.compute_nodes)
    size = (info.size_bytes or 0) / 1e6
    return (
        name,
        asked,
        shown({p: n for p, n in planned.counts().items() if n}),
        shown(found),
        "; ".join(info.not_honoured) or "none",
        f"{size:.1f}",
        f"{info.seconds:.1f}",
    )


def shown(amounts: dict[str, int] | Counter[str]) -> str:
    """ "52 INT8 + 1 FP32"."""
    return " + ".join(f"{n} {p.upper()}" for p, n in sorted(amounts.items(), key=lambda e: -e[1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="models whose name holds this text")
    parser.add_argument("--capability", default="8.9", help="compute capability to build for")
    arguments = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"the models and pictures are not at {DATA}: set TRTUNE_DATA")
    cases = [(name, asked) for name in FLOAT for asked in PRECISIONS] + [(n, "QAT") for n in QAT]
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    with tempfile.TemporaryDirectory() as folder:
        for name, asked in cases:
            if arguments.only in name:
                row = row_of(name, asked, arguments.capability, Path(folder))
                lines.append("| " + " | ".join(row) + " |")
                print(lines[-1], flush=True)
    if not arguments.only:
        title = (
            f"# TensorRT-RTX\n\nBuilt {time.strftime('%Y-%m-%d')} with TensorRT-RTX "
            f"{version('tensorrt-rtx')} for compute capability {arguments.capability}, without a "
            "GPU.\n\n"
        )
        (HERE / "results" / "rtx.md").write_text(title + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
