"""What quantizing one thing alone does to the output.

Everything before the change computes what it computes in FP32, so only the rest of the network is
run: a session over the nodes behind the change, fed with FP32 activations that were stored once
and the changed tensor. Several amax candidates for a tensor share that session, and tensors are
shared out over the cores.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from trtune.calibrate.float8 import float8_codes, float8_weight_scales, through_float8
from trtune.calibrate.sessions import SharedWeights
from trtune.calibrate.table import CalibrationTable
from trtune.configs.progress import Progress, silent
from trtune.configs.system.compiled import compiled
from trtune.configs.system.machine import one_thread_each, usable_cores
from trtune.datasets.batches import Batch
from trtune.precision.compare.in_graph import stays_in_graph
from trtune.precision.graph.proto import copy_of, default_opset, inputs_of
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.lower.rewrite import quantize_weights, weight_scales
from trtune.precision.plan.float8 import FP8
from trtune.precision.plan.placement import Edge, Placement, edges_of, place
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.runtime.errors import ErrorSums
from trtune.precision.runtime.output_groups import (
    OutputGroup,
    add_parts,
    output_groups,
    worst_output,
)
from trtune.precision.runtime.resident import Resident
from trtune.precision.runtime.session import (
    ahead,
    kept_values,
    make_session,
    named_values,
    threads_each,
)
from trtune.precision.runtime.side_by_side import SideBySide, through_int8

log = logging.getLogger(__name__)

CLIP_INPUTS = 11
"""The version of the operators in which Clip takes its bounds as inputs, and Round is there."""
TRIALS_WAITING = 2
"""Batches full of trials that are asked for at a time: the next is ready when one has run."""
Changed = NDArray[Any] | float
"""A tensor's other values; or the scale through which its own go, to int8 and back."""
Rest = Callable[[int, Mapping[str, Changed]], list[NDArray[Any]]]
"""The rest of a network: from a batch number and changed tensors to the model's outputs."""
Result = TypeVar("Result")
Task = TypeVar("Task")


def fake_quantize(values: NDArray[np.floating[Any]], scale: float) -> NDArray[np.float32]:
    """`values` through int8 and back: clip(round half to even(x / scale), -128, 127) * scale.

    The arithmetic of QuantizeLinear and DequantizeLinear in float32; same shape.
    """
    held = np.ascontiguousarray(values, np.float32)
    result = np.empty_like(held)
    _fake_quantize(held.reshape(-1), np.float32(scale), result.reshape(-1))
    return result


@compiled()
def _fake_quantize(values: Any, step: Any, result: Any) -> None:
    low, high = np.float32(-128), np.float32(127)
    for i in range(values.size):
        result[i] = min(max(np.rint(values[i] / step), low), high) * step


def read_in(
    codes: str, values: NDArray[np.floating[Any]], tensor: str, table: CalibrationTable
) -> NDArray[np.float32]:
    """What a node reads of the `values` of `tensor` that is quantized as int8 or fp8 `codes`."""
    if codes == FP8:
        return through_float8(values, table.float8_scale(tensor))
    return fake_quantize(values, table.scale(tensor))


def fake_quantize_weights(
    weights: NDArray[Any], axis: int, given: Sequence[float] | None = None, codes: str = "int8"
) -> NDArray[np.float32]:
    """`weights` as their int8 or fp8 `codes` say, per channel along `axis`; same shape, float32.

    `given` are the scales, one a channel or one for all; by default max|w| / 127 or 448.
    """
    if codes == FP8:
        return _through_float8(weights, axis, given)
    lowest = -127 if given is None else -128
    scales = weight_scales(weights, axis)
    if given is not None:
        scales = np.broadcast_to(np.asarray(given, np.float32), scales.shape)
    shape = [1] * weights.ndim
    shape[axis] = -1
    found = quantize_weights(weights, scales, axis, lowest=lowest).astype(np.float32)
    return found * scales.reshape(shape)


def _through_float8(
    weights: NDArray[Any], axis: int, given: Sequence[float] | None
) -> NDArray[np.float32]:
    scales = float8_weight_scales(weights, axis)
    if given is not None:
        scales = np.broadcast_to(np.asarray(given, np.float32), scales.shape)
    shape = [1] * weights.ndim
    shape[axis] = -1
    steps = scales.reshape(shape)
    found: NDArray[np.float32] = float8_codes(weights / steps).astype(np.float32) * steps
    return found


@dataclass(frozen=True, slots=True)
class Change:
    """What is quantized: `edges` read their tensor quantized, `weights` are replaced.

    `codes` is what the weights become, int8 or fp8. `scales` are those of weights that have others
    than max|w| / 127 or 448. `values` are constants that stand at an input instead of the model's,
    or at an optional one that it leaves out.
    """

    edges: tuple[Edge, ...]
    weights: tuple[tuple[Edge, str, int], ...] = ()
    scales: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    values: Mapping[Edge, NDArray[Any]] = field(default_factory=dict)
    codes: str = "int8"


class Alone:
    """Runs the rest of the network behind a change, on a few pictures held in memory.

    `pictures` are batches with the model's feeds; the FP32 activations that a change of some edges
    of `placement` needs (`held_tensors`) are computed once and held, and those in `also`. `device`
    is where the network runs. With `in_graph` (by default on a GPU) what goes through int8
    (`through`) does so in the session, from activations that stay on the device; the session of the
    FP32 network is kept then, as `whole`. Thread-safe.
    """

    def __init__(
        self,
        model: Model,
        view: GraphView,
        placement: Placement,
        pictures: Sequence[Batch],
        *,
        also: Sequence[str] = (),
        device: str = "cpu",
        in_graph: bool | None = None,
    ) -> None:
        self.model, self._view, self._device = model, view, device
        inside = stays_in_graph(device, in_graph)
        self._in_graph = inside and (default_opset(model.proto) or 0) >= CLIP_INPUTS
        self._outputs = tuple(o.name for o in model.outputs)
        self._weights = SharedWeights(view.initializers.values())
        held = dict.fromkeys([*held_tensors(view, placement), *also])
        inner = [t for t in held if t not in set(view.graph_inputs)]
        session = make_session(
            self._weights.without(model.proto),
            outputs=inner,
            threads=threads_each(device),
            external_dir=model.external_dir,
            device=device,
            weights=self._weights,
        )
        names = [*dict.fromkeys([*self._outputs, *inner])]
        self._pictures = tuple(len(batch) for batch in pictures)

        def run(batch: Batch) -> dict[str, NDArray[Any]]:
            return {**batch.feeds, **kept_values(session, names, batch.feeds)}

        self._stored = [values for _, values in ahead(run, pictures, device=device)]
        self._resident = Resident(self._stored, device)
        self.whole = session if self._in_graph else None
        self._beside: SideBySide | None = None

    def through(self, batch: int, tensor: str, scale: float) -> Changed:
        """What a session takes for a held `tensor` that goes through int8 with `scale`."""
        return scale if self._in_graph else fake_quantize(self.stored(batch, tensor), scale)

    def side_by_side(self, edges: Mapping[str, Sequence[Edge]]) -> None:
        """Let trials that change some tensors of `edges`, as these read them, share batches, where
        runs stay on the device and that can be done."""
        if not self._in_graph:
            return
        try:
            self._beside = SideBySide(self.model, self._weights, edges, self._stored, self._device)
        except ValueError as error:
            log.info("ranges are tried one after the other: %s", error)
            return
        self._read = {tensor: set(found) for tensor, found in edges.items()}

    @property
    def shares_batches(self) -> bool:
        """Whether trials do, once `side_by_side` was asked for."""
        return self._beside is not None

    @property
    def trials_at_once(self) -> int:
        """How many trials should be asked for at a time."""
        beside = self._beside
        return usable_cores() if beside is None else TRIALS_WAITING * beside.trials

    def session(self, change: Change, *, int8: bool = False) -> Rest:
        """A function from a batch number and the changed tensors to the model's outputs.

        With `int8` all of these come from `through`.
        """
        stepped = self._in_graph and int8
        beside = self._beside
        if stepped and beside is not None and self._is_beside(change):
            return lambda batch, changed: beside.run(
                batch, {tensor: float(step) for tensor, step in changed.items()}
            )
        nodes = _behind(self._view, [*change.edges, *change.values])
        made = {output for node in nodes for output in node.output}
        names = [o for o in self._outputs if o in made]
        if not names:
            return lambda batch, changed: self.reference(batch)
        boundary = _boundary(self._view, nodes)
        edited = {name for name, _ in (*change.edges, *change.values)}
        edited.update(name for (name, _), *_ in change.weights)
        copies = {n.name: copy_of(n) if n.name in edited else n for n in nodes}
        renamed: dict[str, str] = {}
        for name, index in change.edges:
            tensor = copies[name].input[index]
            renamed[tensor] = f"{tensor}/changed"
            copies[name].input[index] = renamed[tensor]
        weights = {}
        for (name, index), weight, axis in change.weights:
            given = change.scales.get(weight)
            value = fake_quantize_weights(self._view.constant(weight), axis, given, change.codes)
            weights[f"{weight}/changed"] = value
            copies[name].input[index] = f"{weight}/changed"
        for number, ((name, index), value) in enumerate(change.values.items()):
            weights[f"{name}/value{number}"] = value
            while len(copies[name].input) <= index:
                copies[name].input.append("")
            copies[name].input[index] = f"{name}/value{number}"
        through: list[onnx.NodeProto] = []
        for tensor, result in renamed.items() if stepped else ():
            through += through_int8(tensor, tensor, f"{tensor}/step", result)
        proto = self._submodel([*through, *copies.values()], weights)
        session = make_session(
            proto,
            threads=1,
            external_dir=self.model.external_dir,
            device=self._device,
            weights=self._weights,
        )
        wanted = {entry.name for entry in session.get_inputs()}
        plain = [tensor for tensor in boundary if tensor in wanted]

        def run(batch: int, changed: Mapping[str, Changed]) -> list[NDArray[Any]]:
            stored = self._stored[batch]
            if stepped:
                steps = {f"{t}/step": np.float32(step) for t, step in changed.items()}
                held = [tensor for tensor in wanted if tensor in stored]
                found = self._resident.run(session, names, batch, held, steps)
            else:
                feeds = {tensor: stored[tensor] for tensor in plain}
                feeds |= {
                    renamed[t]: np.asarray(a) for t, a in changed.items() if renamed[t] in wanted
                }
                found = named_values(session, names, feeds)
            return [found[o] if o in found else stored[o] for o in self._outputs]

        return run

    def _is_beside(self, change: Change) -> bool:
        """Whether `change` is one of the activations alone that share batches."""
        changed: dict[str, set[Edge]] = {}
        for name, index in change.edges:
            tensor = self._view.by_name[name].input[index]
            changed.setdefault(tensor, set()).add((name, index))
        alike = all(self._read.get(tensor) == edges for tensor, edges in changed.items())
        return alike and not change.weights and not change.values

    def _submodel(
        self, nodes: Sequence[onnx.NodeProto], weights: Mapping[str, NDArray[Any]]
    ) -> onnx.ModelProto:
        made = {output for node in nodes for output in node.output}
        read = dict.fromkeys(name for node in nodes for name in inputs_of(node))
        constants = self._constants(tensor for tensor in read if tensor not in made)
        made |= {o for node in constants for o in node.output}
        names = {*read, *(name for node in constants for name in inputs_of(node))}
        held_once = self._weights.light
        initializers = [held_once(t) for n, t in self._view.initializers.items() if n in names]
        initializers += [numpy_helper.from_array(value, name) for name, value in weights.items()]
        held = {t.name for t in initializers}
        inputs = [self._value_info(name) for name in read if name not in made and name not in held]
        outputs = [o for o in self.model.proto.graph.output if o.name in made]
        graph = onnx.GraphProto(name="alone")
        graph.node.extend([*constants, *nodes])
        graph.initializer.extend(initializers)
        graph.input.extend(inputs)
        graph.output.extend(outputs)
        return onnx.ModelProto(
            ir_version=self.model.proto.ir_version,
            opset_import=self.model.proto.opset_import,
            functions=self.model.proto.functions,
            graph=graph,
        )

    def _constants(self, tensors: Iterable[str]) -> list[onnx.NodeProto]:
        """Nodes that compute constants from initializers."""
        wanted = [t for t in tensors if t in self._view.producer and self._view.is_constant(t)]
        names = {self._view.producer[t] for t in wanted} | self._view.ancestors(wanted)
        return [node for node in self._view.nodes if node.name in names]

    def _value_info(self, name: str) -> onnx.ValueInfoProto:
        stored = self._stored[0].get(name.removesuffix("/changed"))
        kind = onnx.TensorProto.FLOAT
        shape: list[Any] | None = None if stored is not None or not name.endswith("/step") else []
        if stored is not None:
            kind = onnx.helper.np_dtype_to_tensor_dtype(stored.dtype)
            shape = [None] * stored.ndim
        return onnx.helper.make_tensor_value_info(name, kind, shape)

    def stored(self, batch: int, tensor: str) -> NDArray[Any]:
        """The FP32 values of a tensor at which a change can begin."""
        return self._stored[batch][tensor]

    @property
    def batches(self) -> int:
        """How many batches are held."""
        return len(self._stored)

    def pictures(self, batch: int) -> int:
        """How many pictures a batch has."""
        return self._pictures[batch]

    def reference(self, batch: int) -> list[NDArray[Any]]:
        """The model's FP32 outputs."""
        return [self._stored[batch][name] for name in self._outputs]

    @cached_property
    def groups(self) -> tuple[OutputGroup, ...]:
        """The parts of the outputs that are judged apart."""
        return output_groups({n: [s[n] for s in self._stored] for n in self.model.judged})

    def compared(
        self, sums: Mapping[str, ErrorSums], batch: int, outputs: Sequence[NDArray[Any]]
    ) -> dict[str, ErrorSums]:
        """`sums` by group with the model's `outputs` for a batch, in its order, added."""
        named = dict(zip(self._outputs, outputs, strict=True))
        return add_parts(sums, self.groups, self._stored[batch], named)


def held_tensors(view: GraphView, placement: Placement) -> list[str]:
    """The tensors whose FP32 values `Alone` keeps, whichever edges of `placement` are changed.

    Those are the tensors read there, and what the nodes behind each edge read from before.
    """
    changed = {name: None for edges in placement.activations.values() for name, _ in edges}
    bits = {name: 1 << number for number, name in enumerate(changed)}
    behind = _bits_behind(view, bits)
    needed = dict.fromkeys(placement.activations)
    for tensor, readers in view.consumers.items():
        if view.is_constant(tensor):
            continue
        made = behind.get(view.producer.get(tensor, ""), 0)
        if any(behind[name] & ~made for name, _ in readers):
            needed[tensor] = None
    return list(needed)


def _bits_behind(view: GraphView, bits: Mapping[str, int]) -> dict[str, int]:
    """For each node the bits of those that it is behind, with its own."""
    found: dict[str, int] = {}
    for node in view.nodes:
        held = bits.get(node.name, 0)
        for tensor in view.reads(node.name):
            held |= found.get(view.producer.get(tensor, ""), 0)
        found[node.name] = held
    return found


def _behind(view: GraphView, edges: Iterable[Edge]) -> list[onnx.NodeProto]:
    first = {node for node, _ in edges}
    outputs = [o for node in first for o in view.by_name[node].output if o]
    behind = view.descendants(outputs) | first
    return [node for node in view.nodes if node.name in behind]


def _boundary(view: GraphView, nodes: Sequence[onnx.NodeProto]) -> list[str]:
    made = {output for node in nodes for output in node.output}
    read = dict.fromkeys(name for node in nodes for name in inputs_of(node))
    return [t for t in read if t not in made and not view.is_constant(t)]


def in_parallel(
    task: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    what: str,
    workers: int = 0,
    seconds: float = math.inf,
    progress: Progress = silent,
) -> list[Result]:
    """The results of `task` for each of `tasks`, in their order, by `workers` threads (0: as many
    as there are usable cores).

    Once `seconds` are over no more are begun: there are results for the first tasks then, and for
    at least one.
    """
    results: list[Result] = []
    until = time.monotonic() + seconds
    progress(what, 0, len(tasks))
    pool = ThreadPoolExecutor(workers or usable_cores(), thread_name_prefix="alone")
    with one_thread_each():
        try:
            for result in pool.map(task, tasks):
                results.append(result)
                progress(what, len(results), len(tasks))
                if time.monotonic() >= until:
                    break
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return results


def alone_errors(
    alone: Alone,
    view: GraphView,
    plan: PrecisionPlan,
    table: CalibrationTable,
    *,
    nodes: Sequence[str] | None = None,
    seconds: float = math.inf,
    progress: Progress = silent,
) -> dict[str, ErrorSums]:
    """What quantizing an int8 or fp8 node of `plan` alone, weights, input and skip input, does.

    Node -> errors of the output that suffers most, against FP32 over the pictures that `alone`
    holds; channels of another magnitude are an output of their own. `nodes` are those asked, in
    this order until `seconds` are over; all of them by default. The result is in graph order.
    """
    placement = place(view, plan)
    weights = {edge[0]: (edge, name, axis) for edge, (name, axis) in placement.weights.items()}

    def measure(name: str) -> ErrorSums:
        edges = edges_of(view, plan, view.by_name[name])
        own = (weights[name],) if name in weights else ()  # a product of data has none
        codes = plan.precision(name)
        scales = table.float8_weights if codes == FP8 else table.weights
        int8 = codes != FP8
        run = alone.session(Change(edges, own, scales, codes=codes), int8=int8)
        tensors = {view.by_name[n].input[i] for n, i in edges}
        sums: dict[str, ErrorSums] = {}
        for batch in range(alone.batches):
            changed: dict[str, Changed] = {
                t: alone.through(batch, t, table.scale(t))
                if int8
                else read_in(codes, alone.stored(batch, t), t, table)
                for t in tensors
            }
            sums = alone.compared(sums, batch, run(batch, changed))
        return worst_output(sums)

    asked = list(plan.quantized_nodes if nodes is None else nodes)
    found = in_parallel(measure, asked, what="rank layers", seconds=seconds, progress=progress)
    errors = dict(zip(asked, found, strict=False))
    return {name: errors[name] for name in plan.quantized_nodes if name in errors}
