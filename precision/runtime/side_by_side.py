"""Trials of many ranges side by side in one batch of the whole network.

On a GPU a session for the part of a network behind one range takes longer to be made, and to plan
its convolutions, than all of its runs take; so do many small runs one after the other. Here there
is one session, in which a batch holds the same few pictures many times over, once a trial, and each
quantized tensor is told which of them go through which step: those alone are taken out, quantized
and put back.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from trtune.calibrate.cpu.segments import holds_graphs
from trtune.calibrate.gpu.memory import device_memory
from trtune.calibrate.sessions import ORT_ERRORS, SharedWeights, cuda_number
from trtune.configs.errors import ModelError
from trtune.precision.graph.proto import replace_field
from trtune.precision.graph.view import Model
from trtune.precision.plan.placement import Edge
from trtune.precision.runtime.session import make_session

log = logging.getLogger(__name__)

ROWS = 64
"""Pictures a batch, at most: enough to fill a GPU."""

ROOM = 1 << 30
"""Bytes, at most, that the quantized tensors of a batch may take together on a CPU."""

ROOM_SHARE = 8
"""... and the part of a GPU's memory: 1 / ROOM_SHARE."""

FEWEST = 4
"""Trials a batch, at least: fewer are no better than one after the other."""

AGREES = 1e-3
"""By how much of the largest value a picture's output may differ between batches."""

Array = NDArray[Any]


@dataclass(slots=True)
class _Trial:
    batch: int
    steps: Mapping[str, float]
    found: list[Array] | None = None
    error: Exception | None = None


class SideBySide:
    """Runs trials, which threads ask for at the same time, in common batches. Thread-safe.

    `edges` maps each tensor that can have a step to the edges that read it quantized; `stored` are
    the tensors and inputs of each batch of pictures, `outputs` the model's with their FP32 values
    there. `trials` is how many a batch holds. Raises ValueError, with the reason, where pictures
    cannot be told apart in a larger batch, onnxruntime cannot run it, or there is no room for
    `FEWEST` trials.
    """

    def __init__(
        self,
        model: Model,
        weights: SharedWeights,
        edges: Mapping[str, Sequence[Edge]],
        stored: Sequence[Mapping[str, Array]],
        device: str,
    ) -> None:
        if holds_graphs(model.proto.graph):
            raise ValueError("it holds graphs within graphs")
        self._outputs = [output.name for output in model.outputs]
        inputs = [spec.name for spec in model.inputs]
        self.pictures = _pictures(stored, [*edges, *inputs, *self._outputs])
        if any(stored[0][tensor].dtype != np.float32 for tensor in edges):
            raise ValueError("not all tensors are float32")
        fed = len(stored) * sum(stored[0][name].nbytes for name in inputs)
        each = (fed + sum(stored[0][tensor].nbytes for tensor in edges)) // self.pictures
        self._number = cuda_number(device)
        room = ROOM if self._number is None else device_memory(self._number) // ROOM_SHARE
        self.trials = min(ROWS, room // max(each, 1)) // self.pictures
        if self.trials < FEWEST:
            raise ValueError(f"a batch holds {self.trials} trials")
        self._ranks = {tensor: stored[0][tensor].ndim for tensor in edges}
        self._fed = [
            {name: self._value(np.concatenate([held[name]] * self.trials)) for name in inputs}
            for held in stored
        ]
        self._idle = {
            name: self._value(array)
            for tensor in edges
            for name, array in self._stepping(tensor, {self.trials - 1: 0.0}).items()
        }
        proto = _with_steps(weights.without(model.proto), edges, self._ranks)
        try:
            self._session = make_session(
                proto,
                threads=1,
                external_dir=model.external_dir,
                device=device,
                weights=weights,
            )
        except ModelError as error:
            raise ValueError(str(error)) from error
        self._lock, self._running = threading.Lock(), threading.Lock()
        self._waiting: list[_Trial] = []
        self._check(stored[0], edges)

    def run(self, batch: int, steps: Mapping[str, float]) -> list[Array]:
        """The model's outputs for a batch of pictures with these tensors through int8 and back.

        Trials that wait while another batch runs are run together. Raises what onnxruntime raises.
        """
        trial = _Trial(batch, steps)
        with self._lock:
            self._waiting.append(trial)
        with self._running:
            if trial.found is None and trial.error is None:
                self._serve(trial)
        if trial.error is not None:
            raise trial.error
        assert trial.found is not None
        return trial.found

    def _serve(self, trial: _Trial) -> None:
        with self._lock:
            others = [t for t in self._waiting if t.batch == trial.batch and t is not trial]
            taken = [trial, *others[: self.trials - 1]]
            self._waiting = [t for t in self._waiting if all(t is not other for other in taken)]
        try:
            found = self._run(trial.batch, [one.steps for one in taken])
        except ORT_ERRORS as error:
            for one in taken:
                one.error = error
            return
        for number, one in enumerate(taken):
            rows = slice(number * self.pictures, (number + 1) * self.pictures)
            one.found = [array[rows] for array in found]

    def _run(self, batch: int, trials: Sequence[Mapping[str, float]]) -> list[Array]:
        stepped: dict[str, dict[int, float]] = {}
        for number, steps in enumerate(trials):
            for tensor, step in steps.items():
                stepped.setdefault(tensor, {})[number] = step
        feeds = self._idle | self._fed[batch]
        for tensor, found in stepped.items():
            for name, array in self._stepping(tensor, found).items():
                feeds[name] = ort.OrtValue.ortvalue_from_numpy(array)
        values = self._session.run_with_ort_values(self._outputs, feeds)
        return [value.numpy() for value in values]

    def _stepping(self, tensor: str, steps: Mapping[int, float]) -> dict[str, Array]:
        """The rows of a batch that are the pictures of these trials, and the step of each; 0 is
        none."""
        first = np.array(list(steps), np.int64)[:, None] * self.pictures
        rows = (first + np.arange(self.pictures)).reshape(-1)
        values = np.repeat(np.array(list(steps.values()), np.float32), self.pictures)
        return {
            f"{tensor}/rows": rows,
            f"{tensor}/at": rows.reshape(-1, *[1] * (self._ranks[tensor] - 1)),
            f"{tensor}/step": values.reshape(-1, *[1] * (self._ranks[tensor] - 1)),
        }

    def _value(self, array: Array) -> ort.OrtValue:
        array = np.ascontiguousarray(array)
        if self._number is None:
            return ort.OrtValue.ortvalue_from_numpy(array)
        return ort.OrtValue.ortvalue_from_numpy(array, "cuda", self._number)

    def _check(self, stored: Mapping[str, Array], edges: Mapping[str, Sequence[Edge]]) -> None:
        """That a picture without steps gives what it gave, beside others with coarse ones."""
        coarse = {t: float(np.abs(stored[t]).max(initial=0)) / 4 for t in edges}
        try:
            found = self._run(0, [{}, *[coarse] * (self.trials - 1)])
        except ORT_ERRORS as error:
            raise ValueError(f"onnxruntime cannot run it: {error}") from error
        for name, array in zip(self._outputs, found, strict=True):
            exact = stored[name]
            if array.shape != (len(exact) * self.trials, *exact.shape[1:]):
                raise ValueError(f"output {name!r} of a larger batch has shape {array.shape}")
            finite = exact[np.isfinite(exact)]
            most = AGREES * float(np.abs(finite).max(initial=0))
            alike = np.allclose(array[: len(exact)], exact, rtol=0, atol=most, equal_nan=True)
            if not alike:
                raise ValueError(f"output {name!r} of a picture follows the others in its batch")


def _pictures(stored: Sequence[Mapping[str, Array]], names: Sequence[str]) -> int:
    """How many pictures each batch has, if all that is named has them along its first axis."""
    arrays = [held[name] for held in stored for name in names]
    if not all(isinstance(a, np.ndarray) and a.dtype.kind in "fiub" for a in arrays):
        raise ValueError("not everything is an array of numbers")
    found = {array.shape[0] if array.ndim else 0 for array in arrays}
    count = min(found)
    if len(found) > 1 or count < 1:
        raise ValueError("not everything has its pictures along the first axis")
    return int(count)


def _with_steps(
    model: onnx.ModelProto, edges: Mapping[str, Sequence[Edge]], ranks: Mapping[str, int]
) -> onnx.ModelProto:
    """`model`, changed in place: inputs for each tensor T of `edges`, `T/rows`, `T/at` (the same as
    a column) and `T/step`, say which rows go through which step before they read it."""
    through = {edge: tensor for tensor, found in edges.items() for edge in found}
    given = {info.name for info in model.graph.input}
    for tensor, rank in ranks.items():
        for name, kind, shape in (
            (f"{tensor}/rows", onnx.TensorProto.INT64, [None]),
            (f"{tensor}/at", onnx.TensorProto.INT64, [None, *[1] * (rank - 1)]),
            (f"{tensor}/step", onnx.TensorProto.FLOAT, [None, *[1] * (rank - 1)]),
        ):
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, shape))
    nodes = [node for tensor in edges if tensor in given for node in _stepped(tensor)]
    for node in model.graph.node:
        for index, tensor in enumerate(node.input):
            if through.get((node.name, index)) == tensor:
                node.input[index] = f"{tensor}/stepped"
        nodes.append(node)
        nodes += [n for tensor in node.output if tensor in edges for n in _stepped(tensor)]
    replace_field(model.graph.node, nodes)
    return model


def _stepped(tensor: str) -> list[onnx.NodeProto]:
    """Nodes that give `T/stepped`: T whose `T/rows` went through int8 and back where the step is
    above zero."""
    parts = ("rows", "at", "step", "none", "taken", "values", "is", "chosen", "all", "places")
    name = {part: f"{tensor}/{part}" for part in (*parts, "stepped")}
    none = onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [], [0.0])
    return [
        onnx.helper.make_node("Constant", [], [name["none"]], value=none),
        _node("Gather", (tensor, name["rows"]), name["taken"]),
        *through_int8(tensor, name["taken"], name["step"], name["values"]),
        _node("Greater", (name["step"], name["none"]), name["is"]),
        _node("Where", (name["is"], name["values"], name["taken"]), name["chosen"]),
        # ScatterND has one thread a row on a GPU; this one has one a value. Its indices are spread
        # by a comparison, for what Expand is told the shape of would be computed on the host.
        _node("Equal", (name["taken"], name["taken"]), name["all"]),
        _node("Where", (name["all"], name["at"], name["at"]), name["places"]),
        _node("ScatterElements", (tensor, name["places"], name["chosen"]), name["stepped"]),
    ]


def through_int8(tensor: str, source: str, step: str, result: str) -> list[onnx.NodeProto]:
    """Nodes that compute clip(round half to even(source / step), -128, 127) * step in float32.

    What stands between `source` and `result` is named after `tensor`.
    """
    at = {part: f"{tensor}/{part}" for part in ("steps", "rounded", "codes", "lowest", "highest")}
    nodes = []
    for part, value in (("lowest", -128.0), ("highest", 127.0)):
        scalar = onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [], [value])
        nodes.append(onnx.helper.make_node("Constant", [], [at[part]], value=scalar))
    return [
        *nodes,
        _node("Div", (source, step), at["steps"]),
        _node("Round", (at["steps"],), at["rounded"]),
        _node("Clip", (at["rounded"], at["lowest"], at["highest"]), at["codes"]),
        _node("Mul", (at["codes"], step), result),
    ]


def _node(kind: str, inputs: Sequence[str], output: str) -> onnx.NodeProto:
    return onnx.helper.make_node(kind, inputs, [output], name=output)
