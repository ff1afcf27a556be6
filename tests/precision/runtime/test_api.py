from __future__ import annotations

import tinymodels
from candidates import Plan, candidate

from trtune.calibrate.table import CalibrationTable
from trtune.precision.runtime.api import BuildInfo, Candidate


def test_the_key_follows_model_plan_and_scales_but_not_provenance() -> None:
    base = candidate(tinymodels.mlp, Plan("int8"))
    table = CalibrationTable.from_amax({"input": 4.0}, provenance={"data": "other"})
    same = Candidate(base.model, base.plan, table)
    others = [
        candidate(tinymodels.conv_relu, Plan("int8")),
        Candidate(base.model, Plan("fp32"), base.table),  # type: ignore[arg-type]
        Candidate(base.model, base.plan, CalibrationTable.from_amax({"input": 5.0})),
        Candidate(base.model, base.plan, None),
    ]
    assert same.key == base.key
    assert len({base.key, *(other.key for other in others)}) == 5


def test_build_info_cannot_be_changed_through_its_mappings() -> None:
    precisions = {"a": "int8"}
    info = BuildInfo("onnxruntime/emulate", precisions=precisions)
    precisions["a"] = "fp32"
    assert info.precisions["a"] == "int8"
