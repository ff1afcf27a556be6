"""Ranges in company: what an amax does at the output while everything else is quantized too.

The quantized model is run with its scales as inputs, so one session serves any table. To try one
range on a CPU only what lies behind it is run, on values that were stored in front of it; a GPU
runs the whole network in less time than it takes to make a session for a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from trtune.calibrate.sessions import SharedWeights
from trtune.calibrate.table import CalibrationTable
from trtune.configs.progress import Progress, silent
from trtune.configs.system.machine import usable_cores
from trtune.datasets.batches import Batch
from trtune.precision.graph.proto import captured
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.runtime.session import (
    kept_values,
    make_session,
    named_values,
)
from trtune.precision.tune.auto.ranges import Choice, screening_batches
from trtune.precision.tune.judge import Judge, counted_outputs, gain, worst

Array = NDArray[Any]
Errors = list[NDArray[np.float64]]

STRIDE = 1.25
LOWEST, HIGHEST = 0.4, 2.6
"""How far from its present amax a range may go in the second round."""

HOPELESS = 1.02
"""What is this many times worse than now on the screened pictures is given up."""


class Company:
    """The quantized network on a few batches, whose scales can be changed.

    `ranges` maps a range to the tensors that share its amax; those without a pair in the lowered
    model are left out. `references` are the FP32 outputs of each batch. The memory that a round
    takes on a CPU is that of all quantized tensors of all batches. `device` is where the network
    runs.
    """

    def __init__(
        self,
        model: Model,
        plan: PrecisionPlan,
        table: CalibrationTable,
        ranges: Mapping[str, Sequence[str]],
        pictures: Sequence[Batch],
        references: Sequence[Sequence[Array]],
        *,
        device: str = "cpu",
    ) -> None:
        proto = lower_emulate(model, plan, table)
        pairs = _scale_inputs(proto)
        self._model = replace(model, proto=proto)
        self._view = GraphView.of(self._model)
        self._weights = SharedWeights(self._view.initializers.values())
        self._outputs = tuple(o.name for o in model.outputs)
        self._counted = counted_outputs(model)
        self._names = {t: name for t, (name, _) in pairs.items()}
        self._quantizers = {t: node for t, (_, node) in pairs.items()}
        self.ranges = {
            name: held
            for name, tensors in ranges.items()
            if (held := tuple(t for t in tensors if t in pairs))
        }
        self._fixed = {t: table.scale(t) for t in pairs}
        self._device = device
        self._whole = self._session()
        self._measure_on(pictures, references, alike=False)

    def _measure_on(
        self, pictures: Sequence[Batch], references: Sequence[Sequence[Array]], *, alike: bool
    ) -> None:
        self._pictures = pictures
        self._judge = Judge(references, self.pictures, self._counted, alike=alike)
        self._screening = screening_batches(self.pictures)
        self._stored: list[dict[str, Array]] = []

    def on(
        self,
        pictures: Sequence[Batch],
        references: Sequence[Sequence[Array]],
        *,
        alike: bool = False,
    ) -> Company:
        """The same network, its session too, on other batches; `alike` is as in `Judge`."""
        other = copy(self)
        other._measure_on(pictures, references, alike=alike)
        return other

    @property
    def pictures(self) -> list[int]:
        """How many pictures each batch holds."""
        return [len(batch) for batch in self._pictures]

    def errors(self, amaxes: Mapping[str, float], batches: range | None = None) -> Errors:
        """The output errors of each of `batches` (None: of all) with these amaxes; a range without
        one keeps its own."""
        scales = self._scales(amaxes)

        def run(batch: int) -> NDArray[np.float64]:
            return self._judge.errors(batch, self._run_whole(batch, scales))

        return self._each(run, range(len(self._pictures)) if batches is None else batches)

    @property
    def _on_gpu(self) -> bool:
        return self._device != "cpu"

    def _each(self, task: Callable[[int], Any], numbers: Iterable[int]) -> list[Any]:
        """`task` of each number, in order: on all usable cores, or one after the other on a GPU."""
        if self._on_gpu:
            return [task(number) for number in numbers]
        with ThreadPoolExecutor(usable_cores()) as pool:
            return list(pool.map(task, numbers))

    def _session(self, outputs: Sequence[str] = ()) -> ort.InferenceSession:
        """Of the whole network, which gives inner `outputs` too."""
        return make_session(
            self._weights.without(self._model.proto),
            outputs=outputs,
            threads=1,
            external_dir=self._model.external_dir,
            device=self._device,
            weights=self._weights,
        )

    def _run_whole(self, batch: int, scales: Mapping[str, Array]) -> list[Array]:
        found: list[Array] = self._whole.run(
            self._outputs, {**self._pictures[batch].feeds, **scales}
        )
        return found

    def _scales(self, amaxes: Mapping[str, float]) -> dict[str, Array]:
        scales = {self._names[t]: np.float32(s) for t, s in self._fixed.items()}
        for name, tensors in self.ranges.items():
            if amaxes.get(name, 0) > 0:
                value = np.float32(amaxes[name]) / np.float32(127)
                scales |= {self._names[t]: value for t in tensors}
        return {name: np.asarray(value, np.float32) for name, value in scales.items()}

    def round(
        self,
        choices: Mapping[str, Choice],
        limits: Mapping[str, tuple[float, float]],
        *,
        progress: Progress = silent,
    ) -> dict[str, Choice]:
        """Every range again, in graph order, each with all the others as they are by then.

        From its amax in `choices`, steps of 25 % up or else down, at most by `HIGHEST` and
        `LOWEST` and within its `limits`; a step is kept if the pictures show it beyond their noise
        (paired over the pictures). Ranges without `limits` stay as they are.
        """
        amaxes = {name: choices[name].amax for name in self.ranges}
        searched = [name for name in self.ranges if name in limits]
        progress("ranges in company", 0, len(searched))
        if not self._on_gpu:
            self._store(amaxes)
        found = dict(choices)
        now = self.errors(amaxes)
        for number, name in enumerate(searched):
            amax, errors = self._better(name, amaxes, now, limits[name])
            if amax != amaxes[name]:
                amaxes[name], now = amax, errors
                before = choices[name]
                factor = before.factor * amax / before.amax
                found[name] = Choice(amax, before.method, worst(now), factor)
                if not self._on_gpu:
                    self._refresh(name, amaxes)
            progress("ranges in company", number + 1, len(searched))
        self._stored = []
        return found

    def _better(
        self, name: str, amaxes: Mapping[str, float], now: Errors, limits: tuple[float, float]
    ) -> tuple[float, Errors]:
        start = amaxes[name]
        run = self._run_whole if self._on_gpu else self._behind(name, self._outputs)
        low, high = max(LOWEST * start, limits[0]), min(HIGHEST * start, limits[1])

        def tried(amax: float, held: Errors) -> Errors | None:
            scales = self._scales({**amaxes, name: amax})

            def one(batch: int) -> NDArray[np.float64]:
                return self._judge.errors(batch, run(batch, scales))

            first = self._each(one, range(self._screening))
            if worst(first) > HOPELESS * worst(held[: self._screening]):
                return None
            rest = self._each(one, range(self._screening, len(self._pictures)))
            return [*first, *rest]

        for factor in (STRIDE, 1 / STRIDE):
            best, errors = start, now
            while low <= (onward := min(best * factor, max(high, best))) and onward != best:
                new = tried(onward, errors)
                if new is None:
                    break
                part, noise = gain(errors, new)
                if part <= noise:
                    break
                best, errors = onward, new
            if best != start:
                return best, errors
        return start, now

    def _store(self, amaxes: Mapping[str, float]) -> None:
        """Run the whole network and keep what the parts behind each range read."""
        needed: dict[str, None] = {}
        for name in self.ranges:
            nodes = self._nodes_behind(name)
            needed.update(dict.fromkeys(_boundary(self._view, nodes)))
        given = {*self._names.values(), *self._pictures[0].feeds}
        inner = [t for t in needed if t not in given]
        session = self._session(inner)
        names = [*dict.fromkeys([*self._outputs, *inner])]
        scales = self._scales(amaxes)

        def run(batch: int) -> dict[str, Array]:
            feeds = dict(self._pictures[batch].feeds)
            return {**feeds, **kept_values(session, names, feeds | scales)}

        self._stored = self._each(run, range(len(self._pictures)))

    def _refresh(self, name: str, amaxes: Mapping[str, float]) -> None:
        """Bring what is stored behind a range up to date."""
        made = {t for node in self._nodes_behind(name) for t in node.output}
        names = [t for t in self._stored[0] if t in made]
        run = self._behind(name, names)
        scales = self._scales(amaxes)

        def one(batch: int) -> dict[str, Array]:
            found = run(batch, scales)
            return {name: array.copy() for name, array in zip(names, found, strict=True)}

        for stored, new in zip(
            self._stored, self._each(one, range(len(self._stored))), strict=True
        ):
            stored.update(new)

    def _nodes_behind(self, name: str) -> list[onnx.NodeProto]:
        first = {self._quantizers[t] for t in self.ranges[name]}
        outputs = [o for n in first for o in self._view.by_name[n].output]
        behind = self._view.descendants(outputs) | first
        return [node for node in self._view.nodes if node.name in behind]

    def _behind(
        self, name: str, outputs: Sequence[str]
    ) -> Callable[[int, Mapping[str, Array]], list[Array]]:
        """A function from a batch and all scales to `outputs`, running only what is behind."""
        nodes = self._nodes_behind(name)
        proto = _part(self._view, self._model, nodes, self._stored[0], outputs, self._weights)
        session = make_session(
            proto,
            threads=1,
            external_dir=self._model.external_dir,
            device=self._device,
            weights=self._weights,
        )
        wanted = [i.name for i in session.get_inputs()]
        made = [o.name for o in proto.graph.output]

        def run(batch: int, scales: Mapping[str, Array]) -> list[Array]:
            stored = self._stored[batch]
            feeds = {n: scales[n] if n in scales else stored[n] for n in wanted}
            found = named_values(session, made, feeds)
            return [found[o] if o in found else stored[o] for o in outputs]

        return run


def _scale_inputs(proto: onnx.ModelProto) -> dict[str, tuple[str, str]]:
    """Turn the scales of activations into inputs; tensor -> (scale, quantizing node)."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    found: dict[str, tuple[str, str]] = {}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[1] in constants:
            found[node.input[0]] = (node.input[1], node.name)
    names = {name for name, _ in found.values()}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in names]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    kind = onnx.TensorProto.FLOAT
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, kind, []) for name in sorted(names)
    )
    return found


def _part(
    view: GraphView,
    model: Model,
    nodes: Sequence[onnx.NodeProto],
    stored: Mapping[str, Array],
    outputs: Sequence[str],
    weights: SharedWeights,
) -> onnx.ModelProto:
    """A model of `nodes` that reads what is `stored` and the scales."""
    made = {t for node in nodes for t in node.output if t}
    read = dict.fromkeys(t for node in nodes for t in (*node.input, *captured(node)) if t)
    wanted = [t for t in read if t not in made and t in view.producer and view.is_constant(t)]
    names = {view.producer[t] for t in wanted} | view.ancestors(wanted)
    constants = [node for node in view.nodes if node.name in names]
    made |= {t for node in constants for t in node.output}
    read.update(dict.fromkeys(t for node in constants for t in node.input if t))
    graph = onnx.GraphProto(name="behind")
    graph.node.extend([*constants, *nodes])
    graph.initializer.extend(
        weights.light(t) for name, t in view.initializers.items() if name in read
    )
    held = {t.name for t in graph.initializer}
    for name in read:
        if name not in made and name not in held:
            graph.input.append(_info(name, stored))
    graph.output.extend(onnx.ValueInfoProto(name=t) for t in outputs if t in made)
    return onnx.ModelProto(
        ir_version=model.proto.ir_version,
        opset_import=model.proto.opset_import,
        functions=model.proto.functions,
        graph=graph,
    )


def _info(name: str, stored: Mapping[str, Array]) -> onnx.ValueInfoProto:
    if name not in stored:  # a scale
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [])
    kind = onnx.helper.np_dtype_to_tensor_dtype(stored[name].dtype)
    return onnx.helper.make_tensor_value_info(name, kind, [None] * stored[name].ndim)


def _boundary(view: GraphView, nodes: Sequence[onnx.NodeProto]) -> list[str]:
    made = {t for node in nodes for t in node.output}
    read = dict.fromkeys(t for node in nodes for t in (*node.input, *captured(node)) if t)
    return [t for t in read if t not in made and not view.is_constant(t)]
