"""Candidates for tests of what stands around a build."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx

from trtune.calibrate.table import CalibrationTable
from trtune.precision.graph.view import model_from_proto
from trtune.precision.runtime.api import Candidate


@dataclass(frozen=True)
class Plan:
    """As much of a precision plan as a backend asks for."""

    default: str
    pinned: dict[str, str] = field(default_factory=dict)

    def precision(self, node: str) -> str:
        return self.pinned.get(node, self.default)

    @property
    def decisions(self) -> dict[str, object]:
        return {"default": self.default, "pinned": self.pinned}


def candidate(make: Callable[[], onnx.ModelProto], plan: Plan) -> Candidate:
    table = CalibrationTable.from_amax({"input": 4.0})
    return Candidate(model_from_proto(make()), plan, table)  # type: ignore[arg-type]
