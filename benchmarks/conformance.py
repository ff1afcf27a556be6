"""ONNX's own backend tests through loading, folding, planning and int8, against onnxruntime.

    python benchmarks/conformance.py                 # all of them, and results/conformance.md
    python benchmarks/conformance.py --every 20      # one in twenty, for CI

Each test that onnxruntime runs is tried twice: as it is, and with all inputs but the first made
constants, which folding then computes with. Right is what gives onnxruntime's values of the file
once it is loaded, normalised and folded; and then, planned in int8 with the ranges of the test's
own inputs and lowered, the same values again where nothing is quantized (40 dB in half precision),
outputs of the same shapes within 10 dB where something is, and a finite comparison of every node.
Exit status 1 if one crashes or gives other values.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import InputError
from trtune.datasets.batches import Batch
from trtune.precision.compare.by_node import compared_tensors
from trtune.precision.compare.layers import compare_layers
from trtune.precision.graph.file import Model, model_from_proto
from trtune.precision.graph.view import GraphView
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.lower.half_on_cpu import has_halves, in_float32
from trtune.precision.plan.placement import place, without_zero_ranges
from trtune.precision.plan.rules import make_plan
from trtune.precision.runtime.errors import sqnr_db
from trtune.precision.runtime.session import make_session, named_values

Arrays = dict[str, NDArray[Any]]
HERE = Path(__file__).resolve().parent
CLOSE_DB = 10.0
"""What int8 leaves at least, on one test's values; a wrong scale or axis leaves about none."""
HALF_DB = 40.0
"""What rounding to half after every node leaves, where onnxruntime's CPU kernels do not round."""


def cases(every: int) -> Iterator[tuple[str, onnx.ModelProto, Arrays]]:
    """Name, model and first inputs of every test of single nodes with tensors alone."""
    for kind in ("node", "simple", "pytorch-operator", "pytorch-converted"):
        for number, case in enumerate(load_model_tests(kind=kind)):
            if number % every:
                continue
            if case.model is not None:
                proto, rows = case.model, list(case.data_sets[0][0])
            else:
                folder = Path(case.model_dir)
                proto = onnx.load(folder / "model.onnx")
                files = sorted(folder.glob("test_data_set_0/input_*.pb"))
                tensors = [onnx.TensorProto.FromString(file.read_bytes()) for file in files]
                rows = [numpy_helper.to_array(tensor) for tensor in tensors]
            stored = {tensor.name for tensor in proto.graph.initializer}
            names = [info.name for info in proto.graph.input if info.name not in stored]
            if len(names) == len(rows) and all(map(_is_plain, rows)):
                yield case.name, proto, dict(zip(names, rows, strict=True))


def _is_plain(row: Any) -> bool:
    return isinstance(row, (np.ndarray, np.generic)) and row.dtype != object


def with_constants(proto: onnx.ModelProto, inputs: Arrays) -> tuple[onnx.ModelProto, Arrays]:
    """The model with all inputs but the first as initializers."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    first, *others = inputs
    for name in others:
        model.graph.initializer.append(numpy_helper.from_array(inputs[name], name))
    kept = [info for info in model.graph.input if info.name not in others]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return model, {first: inputs[first]}


def values(proto: onnx.ModelProto, inputs: Arrays) -> list[Any]:
    """The outputs in onnxruntime, unoptimized."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: list[Any] = session.run(None, inputs)
    return found


def same(expected: list[Any], found: list[Any]) -> bool:
    """Whether two lists of outputs agree to float noise."""
    return all(
        np.shape(a) == np.shape(b)
        and (
            np.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
            if np.asarray(a).dtype.kind in "fiub"
            else np.array_equal(a, b)
        )
        for a, b in zip(expected, found, strict=True)
    )


def verdict(proto: onnx.ModelProto, inputs: Arrays) -> tuple[str, str]:
    """What loading and then int8 give: "right", "wrong ...", "refused: ...", "crash: ...".

    Empty words for what onnxruntime does not run, and for int8 where loading was not right.
    """
    try:
        expected = values(proto, inputs)
    except Exception:  # onnxruntime's exceptions have no common base
        return "", ""
    model: Model | None = None

    def loaded() -> str:
        nonlocal model
        model = model_from_proto(proto)
        fed = {spec.name: inputs[spec.name] for spec in model.inputs}
        return "right" if same(expected, values(model.proto, fed)) else "wrong"

    first = _word(loaded)
    if model is None or first != "right":
        return first, ""
    return first, _word(partial(in_int8, model, inputs))


def _word(step: Callable[[], str]) -> str:
    """What `step` says, or how it failed."""
    try:
        return step()
    except InputError as error:
        return f"refused: {str(error)[:90]}"
    except Exception as error:  # what a user would see as a bug
        return f"crash: {type(error).__name__}: {str(error)[:120]}"


def in_int8(model: Model, inputs: Arrays) -> str:
    """Plan in int8, ranges of `inputs`, lower, run, compare every node."""
    view = GraphView.of(model)
    plan = make_plan(view, default="int8")
    fed = {spec.name: inputs[spec.name] for spec in model.inputs}
    table = CalibrationTable.from_amax(ranges(model, list(place(view, plan).activations), fed))
    plan = without_zero_ranges(view, plan, table)
    lowered = in_float32(lower_emulate(model, plan, table))
    expected, found = values(model.proto, fed), values(lowered, fed)
    if not plan.int8_nodes and same(expected, found):
        return "right"
    if not plan.int8_nodes and not has_halves(model.proto):
        return "wrong: nothing is quantized"
    if any(np.shape(a) != np.shape(b) for a, b in zip(expected, found, strict=True)):
        return "wrong: other shapes"
    axes = dict.fromkeys(fed, None)
    picture = Batch(fed, ("test",), axes=axes)
    compare_layers(model.proto, lowered, list(compared_tensors(view)), One(picture), pictures=1)
    floats = [(a, b) for a, b in zip(expected, found, strict=True) if _is_real(a)]
    if any(not np.array_equal(np.isnan(a), np.isnan(b)) for a, b in floats):
        return "wrong: other NaN"
    worst = min((_closeness(a, b) for a, b in floats), default=math.inf)
    least = CLOSE_DB if plan.int8_nodes else HALF_DB
    return "right" if worst >= least else f"wrong: {worst:.0f} dB"


def _closeness(exact: NDArray[Any], found: NDArray[Any]) -> float:
    """The SQNR in dB of what is finite on both sides."""
    finite = np.isfinite(exact) & np.isfinite(found)
    return sqnr_db(exact[finite], found[finite])


def _is_real(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.kind == "f" and array.size > 0


def ranges(model: Model, tensors: list[str], fed: Arrays) -> dict[str, float]:
    """The largest magnitude of each of `tensors`."""
    session = make_session(model.proto, outputs=[t for t in tensors if t not in fed])
    names = [t for t in tensors if t not in fed]
    found = {**fed, **named_values(session, names, fed)}
    return {t: float(np.abs(found[t]).max(initial=0)) for t in tensors}


@dataclass(frozen=True, slots=True)
class One:
    """A source of one batch."""

    batch: Batch
    count: int | None = 1
    identity: str = "one"
    skipped: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Batch]:
        yield self.batch


def main() -> int:
    """Print how many tests were tried, right, refused and wrong; 1 if any is wrong or crashes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="try one in so many tests")
    every = parser.parse_args().every
    counts: dict[str, Counter[str]] = {}
    bad: list[str] = []
    for name, proto, inputs in cases(every):
        tried = {"as it is": (proto, inputs)}
        if len(inputs) > 1:
            tried["with constants"] = with_constants(proto, inputs)
        for how, (model, rows) in tried.items():
            for step, found in zip(("loaded", "int8"), verdict(model, rows), strict=True):
                if not found:
                    continue
                counts.setdefault(f"{step}, {how}", Counter())[found] += 1
                if found.startswith(("wrong", "crash")):
                    bad.append(f"{name} ({step}, {how}): {found}")
                    print(bad[-1], flush=True)
    text = report(counts, bad)
    print(text)
    if every == 1:
        heading = (
            "# ONNX's own backend tests\n\n"
            f"onnx {onnx.__version__}, onnxruntime {ort.__version__}: the tests of single nodes "
            "and small models that onnxruntime runs\n(`benchmarks/conformance.py`).\n\n"
        )
        (HERE / "results" / "conformance.md").write_text(heading + text, encoding="utf-8")
    return 1 if bad else 0


def report(counts: dict[str, Counter[str]], bad: list[str]) -> str:
    """The counts as a table, the reasons of what is refused, and what is wrong."""
    lines = ["| | tried | right | refused | wrong or crashed |", "|---|---|---|---|---|"]
    reasons: Counter[str] = Counter()
    for how, counter in counts.items():
        refused = {k: n for k, n in counter.items() if k.startswith("refused")}
        total, right, left = sum(counter.values()), counter["right"], sum(refused.values())
        lines.append(f"| {how} | {total} | {right} | {left} | {total - right - left} |")
        reasons.update(refused)
    lines += ["", *(f"- {count} {reason}" for reason, count in reasons.most_common())]
    return "\n".join([*lines, *(f"- {line}" for line in bad), ""])


if __name__ == "__main__":
    sys.exit(main())
