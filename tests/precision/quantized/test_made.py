"""Small models by other tools, made by `benchmarks/makers.py`: linter, compiler and import agree.

The tools themselves are not needed here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from trtune.configs.errors import ModelError
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
LEAST_DB = 12.0
REFUSED = {
    "modelopt_int4_awq_tr": "block-axis",
    "modelopt_int4_rtn_tr": "int4",
    "onnxruntime_dynamic_tr": "dynamic-quantization",
    "onnxruntime_qdq_s16_tr": "code-type",
    "quark_bf16_tr": "foreign-quantizer",
}
"""What no INT8 can be made of, and the finding that says so."""
OF_ANOTHER_TYPE = {"modelopt_fp8_fp16_tr"}
CHANGED = {
    "aimet_w8a8_tr", "brevitas_pc_u8_cnn", "nncf_mixed_cnn", "nncf_performance_tr",
    "nncf_transformer_tr", "onnxruntime_qdq_pt_u8u8_cnn", "onnxruntime_qdq_u8_tr",
    "onnxruntime_qop_s8_tr", "onnxruntime_qop_u8_cnn", "quark_s8s8_aaws_cnn", "torch_eager_s8_tr",
    "torch_fx_x86_tr",
}  # fmt: skip
"""Those with ranges that are not symmetric."""
FLOAT = {"modelopt_torch_int8_tr": 2, "brevitas_pt_s8_tr": 2, "torch_eager_s8_tr": 2,
         "torch_fx_weights_tr": 7}  # fmt: skip
"""How many products the file leaves in float, where that is more than one."""
FALLBACK = {"modelopt_int8_fp16_cnn": "fp16", "modelopt_int8_bf16_tr": "bf16"}
TAKEN = [path for path in MADE if path.stem not in {*REFUSED, *OF_ANOTHER_TYPE}]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)


def test_every_tool_is_there() -> None:
    tools = {path.name.split("_")[0] for path in MADE}
    assert tools == {"aimet", "brevitas", "modelopt", "nncf", "onnxruntime", "quark", "torch"}


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.stem)
def test_linter_and_compiler_agree(path: Path, tmp_path: Path) -> None:
    original, _ = load_quantized(path)
    built = build_as_it_is(original, tmp_path)
    precisions = {node: account.precision for node, account in built.accounts.items()}
    seen = against_builder(original, lint_model(path), refused=built.refused, precisions=precisions)
    assert seen.disagreements == ()


@pytest.mark.parametrize(("name", "kind"), REFUSED.items())
def test_what_cannot_be_int8_is_refused_with_its_reason(name: str, kind: str) -> None:
    path = next(path for path in MADE if path.stem == name)
    with pytest.raises(ModelError, match=kind):
        import_quantized(path, allow_requantize=True)


@pytest.mark.parametrize("path", TAKEN, ids=lambda path: path.stem)
def test_the_import_is_built_as_planned(path: Path, tmp_path: Path) -> None:
    name, exact = path.stem, path.stem not in CHANGED
    found = import_quantized(path, allow_requantize=not exact)
    assert bool(found.changes) is not exact
    assert found.plan.fallback == FALLBACK.get(name, "fp32")
    assert len(found.plan.compute_nodes) - len(found.plan.int8_nodes) <= FLOAT.get(name, 1)
    spec = found.original.inputs[0]
    shape = [dim if isinstance(dim, int) else 4 for dim in spec.shape]
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for error in quantization_errors(found, [Batch({spec.name: values}, tuple("abcd"))]).values():
        assert error.sqnr_db >= (100 if exact else LEAST_DB)
    backend = RtxBackend(compute_capabilities=["8.9"])
    info = backend.build(Candidate(found.model, found.plan, found.table), tmp_path)
    assert info.not_honoured == ()
    assert {info.precisions[node] for node in found.plan.int8_nodes} <= {"int8"}
