"""What each node of a model takes in onnxruntime, from its own profile.

onnxruntime fuses nodes, renames them and puts others between. Time is that of the node of the model
which a node of onnxruntime's graph is named after, or whose output it makes.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from trtune.calibrate.sessions import open_session

RUNS, FIRST = 20, 3
"""Inferences that are profiled, after so many that are not counted."""
ELEMENTS = 2**17
"""Values that the time of a conversion is measured on: about what a layer of a picture has."""


def profiled_times(
    model: onnx.ModelProto | Path,
    names: Mapping[str, str],
    feeds: Mapping[str, NDArray[Any]],
    *,
    threads: int | None = None,
    integer_kernels: bool = False,
    external_dir: Path | None = None,
) -> dict[str, float]:
    """Node -> the seconds of its kernels in one inference, the least of `RUNS`.

    `names` maps the names of nodes, and of what they make, to the node that is asked about. What
    onnxruntime adds without naming it after one of them is left out. Raises ModelError if
    onnxruntime cannot load the model.
    """
    with tempfile.TemporaryDirectory(prefix="trtune-") as folder:
        target = Path(folder) / "optimized.onnx"
        session = open_session(
            model if isinstance(model, Path) else model.SerializeToString(),
            threads=threads,
            integer_kernels=integer_kernels,
            external_dir=external_dir,
            write_optimized=target,
            profile=Path(folder) / "profile",
        )
        for _ in range(FIRST + RUNS):
            session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
        graph = onnx.load(target, load_external_data=False).graph
    spent = kernel_seconds(events)
    found: dict[str, float] = defaultdict(float)
    for node in graph.node:
        owner = owner_of(node, names)
        if owner:
            found[owner] += spent.get(node.name, 0.0)
    return dict(found)


def kernel_seconds(events: Collection[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of an inference by the name of the kernel's node: the least, which other work on the
    machine disturbs least, without the first."""
    spent: dict[str, list[float]] = defaultdict(list)
    ending = "_kernel_time"
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(ending):
            spent[event["name"].removesuffix(ending)].append(event["dur"] / 1e6)
    return {name: min(times[FIRST:] or times) for name, times in spent.items()}


def owner_of(node: onnx.NodeProto, names: Mapping[str, str]) -> str:
    """Which node a node of onnxruntime's graph stands for; empty if nothing tells.

    By its name, by what it makes, else by the longest beginning of either that is a known name and
    ends where a word does: "conv_1_nchwc", "mul_3/QuickGeluFusion/".
    """
    for text in (node.name, *node.output):
        if text in names:
            return names[text]
    for text in (node.name, *node.output):
        for end in range(len(text) - 1, 0, -1):
            if not text[end].isalnum() and text[:end] in names:
                return names[text[:end]]
    return ""


def owners_in(graph: onnx.GraphProto) -> dict[str, str]:
    """What `profiled_times` wants as `names`: every node by its name, and by its outputs."""
    made = {output: node.name for node in graph.node for output in node.output if output}
    return {**made, **{node.name: node.name for node in graph.node}}


def conversion_seconds(threads: int | None = None) -> tuple[float, float]:
    """Seconds a value to quantize it, and to dequantize it, in onnxruntime here."""
    scale = helper.make_tensor("scale", TensorProto.FLOAT, (), [0.1])
    zero = helper.make_tensor("zero", TensorProto.UINT8, (), [128])
    shape = [1, ELEMENTS]
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"], name="quantize"),
            helper.make_node("DequantizeLinear", ["y", "scale", "zero"], ["z"], name="dequantize"),
        ],
        "conversions",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("y", TensorProto.UINT8, shape),
        ],
        [
            helper.make_tensor_value_info("codes", TensorProto.UINT8, shape),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, shape),
        ],
        [scale, zero],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    feeds: dict[str, NDArray[Any]] = {
        "x": np.ones(shape, np.float32),
        "y": np.ones(shape, np.uint8),
    }
    spent = profiled_times(model, owners_in(graph), feeds, threads=threads)
    return spent["quantize"] / ELEMENTS, spent["dequantize"] / ELEMENTS
