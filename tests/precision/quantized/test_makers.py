"""Networks quantized by public tools: what the linter finds, what is imported, what the compiler
makes of it. Each row says what TensorRT-RTX was seen to do with the import."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from realdata import shared_case
from rtxparts import needs_rtx

from trtune.configs.errors import ModelError
from trtune.datasets.batches import Batch
from trtune.precision.backends.rtx.as_it_is import build_as_it_is
from trtune.precision.backends.rtx.backend import RtxBackend
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.imported import ImportedPlan
from trtune.precision.quantized.against import against_builder
from trtune.precision.quantized.describe import nothing_in_int8
from trtune.precision.quantized.findings import counts
from trtune.precision.quantized.importing import (
    Imported,
    import_quantized,
    lint_model,
    load_quantized,
    quantization_errors,
    strip_file,
)
from trtune.precision.runtime.api import Candidate
from trtune.tools import inspect


@dataclass(frozen=True)
class Row:
    """A file: kinds of findings, what it takes to import it, and the kernels of its products.

    `refused` are kinds that must stand in the error's text. `least` is the SQNR in dB where the
    numbers change (`requantize`).
    """

    findings: Mapping[str, int] = field(default_factory=dict)
    kernels: Mapping[str, int] = field(default_factory=dict)
    fallback: str = "fp32"
    refused: tuple[str, ...] = ()
    requantize: bool = False
    least: float = float("inf")


FILES: dict[str, Row] = {
    "fp16_rest": Row({"half-rest": 1}, {"int8": 3}, "fp16"),
    "makers/mo_int8_max_fp16_cnn": Row(
        {"activation-alone": 1, "half-rest": 1},
        {"int8": 7, "fp16": 1},
        "fp16",
    ),
    "makers/brev_pc_s8_cnn": Row({"computed-codes": 8, "residual": 2}, {"int8": 8}),
    "makers/brev_pt_s8_tr": Row({"computed-codes": 8}, {"int8": 8, "fp32": 2}),
    "makers/eager_s8_cnn": Row(
        {"scale-shape": 10, "pair-before-activation": 3, "weights-alone": 2}, {"int8": 8, "fp32": 2}
    ),
    "makers/ort_qop_cnn": Row(
        {"uint8": 12, "integer-operator": 11, "int32-bias": 8},
        {"int8": 8},
        requantize=True,
        least=30.0,
    ),
    "makers/ort_qop_tr": Row(
        {
            "uint8": 27,
            "integer-operator": 22,
            "constant-pair": 6,
            "scalar-constant": 2,
            "int32-bias": 2,
            "inside-float": 2,
            "uint8-zero-point-128": 1,
        },
        {"int8": 10, "fp32": 1},  # the residual Add, which a normalisation before it shares with
        requantize=True,
        least=25.0,
    ),
    "makers/nncf_performance_tr": Row({}, {"int8": 9, "fp32": 1}),
    "makers/tao_sym_ts_cnn": Row({"weights-alone": 8, "nothing-int8": 1}, {"fp32": 8}),
    "makers/mot_fp8_ts_cnn": Row({"own-fp8": 34, "fp8": 17}, {"fp8": 8}),
    "makers/mo_fp8_max_fp16_cnn": Row({"fp8": 4, "half-rest": 1}, {"fp8": 2, "fp16": 6}, "fp16"),
    "makers/mo_int4_rtn_dq_fp32_tr": Row(
        {"int4": 7, "nothing-int8": 1}, refused=("INT4 is not imported",)
    ),
    "makers/cnn_fp32": Row({}, refused=("nothing to import", "default: int8")),
}  # fmt: skip
TAKEN = [name for name, row in FILES.items() if not row.refused]
REFUSED = [name for name, row in FILES.items() if row.refused]


def model_path(name: str) -> Path:
    return shared_case(f"{name}.onnx")


def taken(name: str) -> Imported:
    return import_quantized(model_path(name), allow_requantize=FILES[name].requantize)


@pytest.mark.parametrize("name", FILES)
def test_findings(name: str) -> None:
    assert counts(lint_model(model_path(name))) == FILES[name].findings


@pytest.mark.parametrize("name", TAKEN)
def test_the_import_gives_what_the_file_gives(name: str) -> None:
    found, row = taken(name), FILES[name]
    assert found.plan.fallback == row.fallback
    spec = found.original.inputs[0]
    shape = [dim if isinstance(dim, int) else 4 for dim in spec.shape]
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    sums = quantization_errors(found, [Batch({spec.name: values}, tuple("abcd"))])
    assert all(error.sqnr_db >= row.least for error in sums.values())


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_true_reason(name: str) -> None:
    with pytest.raises(ModelError) as error:
        import_quantized(model_path(name), allow_requantize=True)
    for words in FILES[name].refused:
        assert words in str(error.value)


@needs_rtx
@pytest.mark.parametrize("name", TAKEN)
def test_the_compiler_runs_it_as_planned(name: str, tmp_path: Path) -> None:
    found = taken(name)
    backend = RtxBackend(compute_capabilities=["8.9"])
    info = backend.build(Candidate(found.model, found.plan, found.table), tmp_path)
    made = Counter(info.precisions[node] for node in found.plan.compute_nodes)
    assert made == FILES[name].kernels


@needs_rtx
@pytest.mark.parametrize("name", FILES)
def test_linter_and_compiler_agree_on_the_file_as_it_stands(name: str, tmp_path: Path) -> None:
    path, (original, _) = model_path(name), load_quantized(model_path(name))
    built = build_as_it_is(original, tmp_path)
    precisions = {node: account.precision for node, account in built.accounts.items()}
    seen = against_builder(original, lint_model(path), refused=built.refused, precisions=precisions)
    assert seen.disagreements == ()
    assert bool(seen.refused) == bool(seen.expected_refusal)


@needs_rtx
@pytest.mark.parametrize("pinned", [False, True])
def test_a_product_of_data_is_planned_and_pinned(pinned: bool, tmp_path: Path) -> None:
    """Its pairs stand before a Reshape and a Transpose; a pin takes them away from there."""
    pins = {"/MatMul": "fp32"} if pinned else {}
    found = import_quantized(model_path("makers/nncf_performance_tr"), pins=pins)
    kind = "fp32" if pinned else "int8"
    assert found.plan.precision("/MatMul") == kind
    moved = {read.node for read in found.plan.active_reads}
    assert ({"/Reshape_1", "/Reshape_2"} <= moved) is not pinned
    backend = RtxBackend(compute_capabilities=["8.9"])
    info = backend.build(Candidate(found.model, found.plan, found.table), tmp_path)
    assert info.precisions["/MatMul"] == kind
    assert info.not_honoured == ()
    again = ImportedPlan.from_json(found.plan.to_json())
    assert again == found.plan
    assert again.active_reads == found.plan.active_reads
    assert not found.plan.by_rules().is_int8("/MatMul")


@pytest.mark.parametrize("name", [name for name in TAKEN if FILES[name].requantize])
def test_asymmetric_ranges_need_a_word(name: str) -> None:
    with pytest.raises(ModelError, match="allow_requantize: true"):
        import_quantized(model_path(name))


def test_a_file_with_nothing_in_int8_says_why_and_writes_no_cache(tmp_path: Path) -> None:
    path = model_path("makers/tao_sym_ts_cnn")
    found = import_quantized(path)
    why = nothing_in_int8(GraphView.of(found.model), found.plan)
    assert why == (
        "no node runs in INT8: float in the QAT model: its weights are quantized, its data are not "
        "(8 nodes)"
    )
    model, cache = tmp_path / "m.onnx", tmp_path / "q.cache"
    with pytest.raises(ModelError, match="would be empty"):
        strip_file(path, model, cache)
    assert not model.exists()
    assert not cache.exists()


def test_inspect_gives_no_advice_that_is_not_so() -> None:
    problems = inspect(model_path("makers/mo_int8_max_fp16_cnn")).problems
    assert any("precision.default: qat" in problem for problem in problems)
    assert not any("export in float32" in problem for problem in problems)
    assert not any("runs no node in INT8" in problem for problem in problems)
