"""ONNX's own backend tests through loading, normalising and folding, against onnxruntime.

    python benchmarks/conformance.py                 # all of them
    python benchmarks/conformance.py --every 20      # one in twenty, for CI

Each test that onnxruntime runs is tried twice: as it is, and with all inputs but the first made
constants, which folding then computes with. Right is what gives onnxruntime's values of the file.
Exit status 1 if one crashes or gives other values.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

from trtune.configs.errors import InputError
from trtune.precision.graph.file import model_from_proto

Arrays = dict[str, NDArray[Any]]


def cases(every: int) -> Iterator[tuple[str, onnx.ModelProto, Arrays]]:
    """Name, model and first inputs of every test of single nodes with tensors alone."""
    from pathlib import Path

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


def verdict(proto: onnx.ModelProto, inputs: Arrays) -> str:
    """ "right", "wrong", "refused: ...", "crash: ...", or "" if onnxruntime does not run it."""
    try:
        expected = values(proto, inputs)
    except Exception:  # onnxruntime's exceptions have no common base
        return ""
    try:
        model = model_from_proto(proto)
    except InputError as error:
        return f"refused: {str(error)[:60]}"
    except Exception as error:
        return f"crash: {type(error).__name__}: {error}"
    fed = {spec.name: inputs[spec.name] for spec in model.inputs}
    try:
        return "right" if same(expected, values(model.proto, fed)) else "wrong"
    except Exception as error:
        return f"crash: {type(error).__name__}: {str(error)[:100]}"


def main() -> int:
    """Print how many tests were tried, right, refused and wrong; 1 if any is wrong or crashes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="try one in so many tests")
    every = parser.parse_args().every
    counts: dict[str, Counter[str]] = {"as it is": Counter(), "constants": Counter()}
    bad = 0
    for name, proto, inputs in cases(every):
        tried = {"as it is": (proto, inputs)}
        if len(inputs) > 1:
            tried["constants"] = with_constants(proto, inputs)
        for how, (model, rows) in tried.items():
            found = verdict(model, rows)
            counts[how][found] += bool(found)
            if found == "wrong" or found.startswith("crash"):
                bad += 1
                print(f"{name} ({how}): {found}")
    for how, counter in counts.items():
        total, right = sum(counter.values()), counter["right"]
        refused = {k: n for k, n in counter.most_common() if k.startswith("refused")}
        print(f"{how}: tried {total}, right {right}, refused {sum(refused.values())}")
        for reason, count in list(refused.items())[:10]:
            print(f"  {count} {reason}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
