"""Errors summed up where the tensors are: two models in one graph, and behind each tensor its sums.

On a GPU the tensors themselves would have to come back to the host, several times over for all that
does not fit at once; the sums of a tensor are six numbers. They are float32 sums of the runtime, as
exact as its reductions are. What they cannot tell (an infinite or missing value, other shapes, a
padded batch) is left to be compared on the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from trtune.calibrate.cpu.segments import holds_graphs
from trtune.calibrate.sessions import ORT_ERRORS
from trtune.precision.runtime.errors import ErrorSums
from trtune.precision.runtime.session import make_session, named_values

TESTED = "trtune_tested/"
_SUMS = ("signal", "noise", "dot", "energy", "relative", "worst")
LEAST_OPSET = 13
"""Where Equal, Where and the reductions, without axes, are what they are in every later version."""


def stays_in_graph(device: str, asked: bool | None) -> bool:
    """Whether what can be computed in the session is, and stays there: as `asked`, else on a GPU.

    >>> stays_in_graph("cuda:0", None), stays_in_graph("cpu", None), stays_in_graph("cpu", True)
    (True, False, True)
    """
    return device != "cpu" if asked is None else asked


def can_merge(reference: onnx.ModelProto, candidate: onnx.ModelProto) -> bool:
    """Whether the two can stand in one graph: the same operators' versions, nothing nested."""
    opsets = [{o.domain or "ai.onnx": o.version for o in m.opset_import}
              for m in (reference, candidate)]  # fmt: skip
    inputs = [{i.name for i in m.graph.input} for m in (reference, candidate)]
    return (
        opsets[0] == opsets[1]
        and opsets[0].get("ai.onnx", 0) >= LEAST_OPSET
        and inputs[0] == inputs[1]
        and not any(m.functions or holds_graphs(m.graph) for m in (reference, candidate))
    )


class SumsInGraph:
    """The error sums of `tensors` between two models that `can_merge`, from one session.

    All of `tensors` have to be float32 in both. `device` is where the session runs.
    """

    def __init__(
        self,
        reference: onnx.ModelProto,
        candidate: onnx.ModelProto,
        tensors: Sequence[str],
        *,
        external_dir: Path | None = None,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        self._tensors = tuple(tensors)
        merged = _merged(reference, candidate, self._tensors)
        self._session = make_session(
            merged, external_dir=external_dir, device=device, threads=threads
        )

    def of(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, ErrorSums] | None:
        """The sums over one batch; None where they have to be taken on the host."""
        wanted = {entry.name for entry in self._session.get_inputs()}
        names = [output.name for output in self._session.get_outputs()]
        given = {name: array for name, array in feeds.items() if name in wanted}
        try:
            values = named_values(self._session, names, given)
        except ORT_ERRORS:  # shapes that cannot be compared: on the host that has its own words
            return None
        found: dict[str, ErrorSums] = {}
        for number, tensor in enumerate(self._tensors):
            sums = values[_sums(number)].astype(np.float64).tolist()
            left, right = values[_sizes(number)].tolist()
            if left != right or not math.isfinite(math.fsum(sums)):
                return None
            signal, noise, dot, energy, relative, worst = sums
            found[tensor] = ErrorSums(
                signal, noise, dot, energy, relative, max_abs=worst, count=int(left)
            )
        return found


def _sums(number: int) -> str:
    return f"trtune_sums{number}"


def _sizes(number: int) -> str:
    return f"trtune_sizes{number}"


def _merged(
    reference: onnx.ModelProto, candidate: onnx.ModelProto, tensors: Sequence[str]
) -> onnx.ModelProto:
    inputs = {info.name for info in reference.graph.input}

    def there(name: str) -> str:
        return name if not name or name in inputs else TESTED + name

    merged = onnx.ModelProto(
        ir_version=max(reference.ir_version, candidate.ir_version),
        opset_import=reference.opset_import,
    )
    graph = merged.graph
    graph.name = "compared"
    graph.input.extend(reference.graph.input)
    graph.initializer.extend(reference.graph.initializer)
    for tensor in candidate.graph.initializer:
        graph.initializer.add().CopyFrom(tensor)
        graph.initializer[-1].name = there(tensor.name)
    graph.node.extend(reference.graph.node)
    for node in candidate.graph.node:
        copy = graph.node.add()
        copy.CopyFrom(node)
        copy.name = TESTED + node.name
        copy.input[:] = [there(name) for name in node.input]
        copy.output[:] = [there(name) for name in node.output]
    graph.initializer.extend(
        (
            numpy_helper.from_array(np.ones(1, np.float32), "trtune_one"),
            numpy_helper.from_array(np.zeros(1, np.float32), "trtune_none"),
            numpy_helper.from_array(np.array([1], np.int64), "trtune_flat"),
        )
    )
    for number, tensor in enumerate(tensors):
        graph.node.extend(_behind(number, tensor, there(tensor)))
        for name, kind in ((_sums(number), onnx.TensorProto.FLOAT),
                           (_sizes(number), onnx.TensorProto.INT64)):  # fmt: skip
            graph.output.append(helper.make_tensor_value_info(name, kind, None))
    return merged


def _behind(number: int, left: str, right: str) -> list[onnx.NodeProto]:
    """The nodes that sum up the tensors `left` (the reference) and `right`."""
    nodes: list[onnx.NodeProto] = []

    def op(kind: str, *inputs: str, out: str, **attributes: Any) -> str:
        name = f"trtune_{number}_{out}"
        nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    error = op("Abs", op("Sub", left, right, out="difference"), out="error")
    size = op("Abs", left, out="size")
    zero = op("Equal", left, "trtune_none", out="is_zero")
    share = op("Div", error, op("Where", zero, "trtune_one", size, out="divisor"), out="share")
    nothing = op("Cast", op("Cast", error, out="differs", to=onnx.TensorProto.BOOL), out="one",
                 to=onnx.TensorProto.FLOAT)  # fmt: skip
    relative = op("Where", zero, nothing, share, out="relative")
    reduced = {
        "signal": op("ReduceSumSquare", left, out="signal", keepdims=0),
        "noise": op("ReduceSumSquare", error, out="noise", keepdims=0),
        "dot": op("ReduceSum", op("Mul", left, right, out="product"), out="dot", keepdims=0),
        "energy": op("ReduceSumSquare", right, out="energy", keepdims=0),
        "relative": op("ReduceSum", relative, out="sum_relative", keepdims=0),
        "worst": op("ReduceMax", error, out="worst", keepdims=0),
    }
    flat = [op("Reshape", reduced[n], "trtune_flat", out=f"flat_{n}") for n in _SUMS]
    sizes = [op("Reshape", op("Size", name, out=f"size_{side}"), "trtune_flat", out=f"count_{side}")
             for side, name in (("left", left), ("right", right))]  # fmt: skip
    nodes.append(helper.make_node("Concat", flat, [_sums(number)], axis=0))
    nodes.append(helper.make_node("Concat", sizes, [_sizes(number)], axis=0))
    return nodes
