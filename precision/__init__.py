"""From a model to a quantized one: which nodes, which tensors, which ranges, and what it costs.

model = load_model(Path("model.onnx"))
plan = make_plan(GraphView.of(model), pins={"op:Gemm": "fp32"})
calibrated = calibrate_model(model, GraphView.of(model), plan, source, method="auto")
quantized = lower_emulate(model, plan, calibrated.table)

The names are imported when they are first used: the runtimes behind some of them take a while.
"""

if __name__ != "trtune.precision":
    raise ImportError(f"{__name__!r} was found through the repository root: use trtune.precision")

from typing import TYPE_CHECKING

from trtune.configs.system.lazy import lazy_names

if TYPE_CHECKING:
    from trtune.precision.compare.alone import Alone, alone_errors
    from trtune.precision.compare.gate import fp32_gate
    from trtune.precision.compare.layers import compare_layers
    from trtune.precision.graph.file import Model, load_model, model_from_proto, save_model
    from trtune.precision.graph.view import GraphView
    from trtune.precision.lower.emulate import LOWERINGS, lower_deploy, lower_emulate
    from trtune.precision.plan.placement import Placement, place, without_zero_ranges
    from trtune.precision.plan.plan import Assignment, PrecisionPlan
    from trtune.precision.plan.rules import make_plan
    from trtune.precision.quantized.describe import Inspection, inspect_model
    from trtune.precision.runtime.api import Backend, BuildInfo, Candidate, Engine, Usable
    from trtune.precision.runtime.errors import ErrorSums
    from trtune.precision.tune.auto.ranges import Choice, choose_by_output
    from trtune.precision.tune.scales import Calibrated, calibrate_model
    from trtune.precision.tune.walk import Score, Tuned

__all__ = [
    "LOWERINGS",
    "Alone",
    "Assignment",
    "Backend",
    "BuildInfo",
    "Calibrated",
    "Candidate",
    "Choice",
    "Engine",
    "ErrorSums",
    "GraphView",
    "Inspection",
    "Model",
    "Placement",
    "PrecisionPlan",
    "Score",
    "Tuned",
    "Usable",
    "alone_errors",
    "calibrate_model",
    "choose_by_output",
    "compare_layers",
    "fp32_gate",
    "inspect_model",
    "load_model",
    "lower_deploy",
    "lower_emulate",
    "make_plan",
    "model_from_proto",
    "place",
    "save_model",
    "without_zero_ranges",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "graph.file": "Model load_model model_from_proto save_model",
        "graph.view": "GraphView",
        "plan.plan": "Assignment PrecisionPlan",
        "plan.rules": "make_plan",
        "plan.placement": "Placement place without_zero_ranges",
        "lower.emulate": "LOWERINGS lower_deploy lower_emulate",
        "runtime.api": "Backend BuildInfo Candidate Engine Usable",
        "runtime.errors": "ErrorSums",
        "compare.alone": "Alone alone_errors",
        "compare.gate": "fp32_gate",
        "compare.layers": "compare_layers",
        "tune.walk": "Score Tuned",
        "tune.auto.ranges": "Choice choose_by_output",
        "tune.scales": "Calibrated calibrate_model",
        "quantized.describe": "Inspection inspect_model",
    },
)
