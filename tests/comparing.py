"""Engines, models and pictures for tests that compare two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import tinymodels
from numpy.typing import NDArray
from onnx import numpy_helper
from tinyquant import Case, Rows

from trtune.datasets.batches import Batch
from trtune.precision.runtime.api import Candidate, Engine
from trtune.precision.runtime.session import OrtEngine, make_session

Array = NDArray[Any]


def engine_of(proto: onnx.ModelProto, outputs: Sequence[str] = ()) -> OrtEngine:
    return OrtEngine(lambda: make_session(proto, outputs=outputs))


def opens(proto: onnx.ModelProto) -> Callable[[Sequence[str]], OrtEngine]:
    return lambda tensors: engine_of(proto, tensors)


def coarse(proto: onnx.ModelProto, *, step: float = 0.05) -> onnx.ModelProto:
    """`proto` with its float weights rounded to multiples of `step`."""
    rounded = onnx.ModelProto()
    rounded.CopyFrom(proto)
    for tensor in rounded.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32 and value.ndim > 1:
            value = (np.round(value / step) * step).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return rounded


def rows(proto: onnx.ModelProto, count: int = 7, *, size: int = 3) -> Rows:
    return Rows(tinymodels.feeds(proto, batch=max(count, 1)), range(count), size)


def inner(proto: onnx.ModelProto) -> list[str]:
    return [name for node in proto.graph.node for name in node.output]


class Shown:
    """An engine whose values are made from those of another: what one that is not right shows."""

    def __init__(self, engine: Engine, change: Callable[[str, Array], Array | None]) -> None:
        self.engine, self.change = engine, change

    def __enter__(self) -> Shown:
        self.engine.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.engine.__exit__(*error)

    @property
    def inputs(self) -> Any:
        return self.engine.inputs

    @property
    def outputs(self) -> Any:
        return self.engine.outputs

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        found = {n: self.change(n, a) for n, a in self.engine.infer(feeds).items()}
        return {name: array for name, array in found.items() if array is not None}


def candidate_of(prepared: Case) -> Candidate:
    return Candidate(prepared.model, prepared.plan, prepared.table)


class Pictures:
    """A `BatchSource` over arrays in memory that counts its passes."""

    identity = "rows"
    skipped: tuple[str, ...] = ()

    def __init__(self, feeds: Mapping[str, NDArray[Any]], size: int, *, known: bool = True) -> None:
        self.feeds, self.size, self.known = feeds, size, known
        self.rows = len(next(iter(feeds.values())))
        self.passes = 0

    @property
    def count(self) -> int | None:
        return self.rows if self.known else None

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        for start in range(0, self.rows, self.size):
            part = {name: array[start : start + self.size] for name, array in self.feeds.items()}
            items = tuple(f"p{k}" for k in range(start, min(start + self.size, self.rows)))
            yield Batch(part, items)


def pictures(model: onnx.ModelProto, rows: int = 7, *, size: int = 3) -> Pictures:
    return Pictures(tinymodels.feeds(model, batch=rows), size)
