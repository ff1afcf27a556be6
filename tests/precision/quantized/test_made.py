"""Small models by other tools, made by `benchmarks/makers.py`: linter, compiler and import agree.

The tools themselves are not needed here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from trtune.datasets.batches import Batch
from trtune.precision.backends.rtx.as_it_is import build_as_it_is
from trtune.precision.backends.rtx.backend import RtxBackend
from trtune.precision.quantized.against import against_builder
from trtune.precision.quantized.importing import (
    import_quantized,
    lint_model,
    load_quantized,
    quantization_errors,
)
from trtune.precision.runtime.api import Candidate

MADE = sorted((Path(__file__).parents[2] / "made").glob("*.onnx"))
EXACT = ("modelopt_", "ort_qdq_s8_")
"""By which of them nothing asymmetric is written."""
FALLBACK = {"modelopt_int8_fp16": "fp16", "modelopt_int8_bf16": "bf16"}
LEAST_DB = 12.0

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)


def test_every_tool_is_there() -> None:
    assert {path.name.split("_")[0] for path in MADE} == {"modelopt", "nncf", "ort"}


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.stem)
def test_linter_and_compiler_agree(path: Path, tmp_path: Path) -> None:
    original, _ = load_quantized(path)
    built = build_as_it_is(original, tmp_path)
    precisions = {node: account.precision for node, account in built.accounts.items()}
    seen = against_builder(original, lint_model(path), refused=built.refused, precisions=precisions)
    assert seen.disagreements == ()


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.stem)
def test_the_import_is_built_as_planned(path: Path, tmp_path: Path) -> None:
    exact = path.stem.startswith(EXACT)
    found = import_quantized(path, allow_requantize=not exact)
    assert bool(found.changes) is not exact
    assert found.plan.fallback == FALLBACK.get(path.stem.rpartition("_")[0], "fp32")
    assert len(found.plan.int8_nodes) >= len(found.plan.compute_nodes) - 1
    spec = found.original.inputs[0]
    shape = [dim if isinstance(dim, int) else 4 for dim in spec.shape]
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for error in quantization_errors(found, [Batch({spec.name: values}, tuple("abcd"))]).values():
        assert error.sqnr_db >= (100 if exact else LEAST_DB)
    backend = RtxBackend(compute_capabilities=["8.9"])
    info = backend.build(Candidate(found.model, found.plan, found.table), tmp_path)
    assert info.not_honoured == ()
    assert {info.precisions[node] for node in found.plan.int8_nodes} == {"int8"}
