"""The seam between a quantized model and the runtimes: what is built, what came out, who runs it.

A `Candidate` (model, plan, table) goes in; a `Backend` lowers and builds it into a folder and says
in a `BuildInfo` what every layer really runs in; its `Engine` runs batches. What differs between
runtimes is data in these values, so that nothing above asks which backend it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from trtune.calibrate.table import CalibrationTable
from trtune.configs.files import hash_json
from trtune.datasets.batches import InputSpec

if TYPE_CHECKING:
    from typing_extensions import Self

    from trtune.precision.graph.view import Model
    from trtune.precision.plan.plan import PrecisionPlan

MODEL_FILE, PLAN_FILE, LOG_FILE = "model.onnx", "engine.plan", "build.log"
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a model: the normalised model, a precision for each node, the scales.

    `table` is None for a plan without int8.
    """

    model: Model
    plan: PrecisionPlan
    table: CalibrationTable | None = None

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each part: `model`, `plan`, `scales` (of the values, not their provenance)."""
        table = self.table
        scales = None if table is None else {**table.scales, **table.imported()}
        return {
            "model": self.model.sha256,
            "plan": hash_json(self.plan.decisions),
            "scales": hash_json(scales),
        }

    @property
    def key(self) -> str:
        """SHA-256 over `hashes`: two candidates with the same key give the same engine."""
        return hash_json(self.hashes)


@dataclass(frozen=True, slots=True)
class BuildInfo:
    """What a build gave.

    `backend` names runtime and lowering ("onnxruntime/emulate"). `path` is the engine file and
    `size_bytes` what it and its side files take, both None if nothing was built. `precisions` maps
    each node to what it really runs in, or "unknown" where the runtime does not tell;
    `not_honoured` says for each node that runs in something else than planned what it was.
    `seconds` is lowering and building, `log` the end of the runtime's log, `reason` why the engine
    cannot run on this machine (empty: it can). `details` is what else the backend knows, as JSON
    has it: `settings` (what the build was asked for), the GPU, the equivalent command, ...
    """

    backend: str
    path: Path | None = None
    size_bytes: int | None = None
    precisions: Mapping[str, str] = field(default_factory=dict)
    not_honoured: tuple[str, ...] = ()
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    log: str = ""
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "precisions", MappingProxyType(dict(self.precisions)))
        object.__setattr__(self, "versions", MappingProxyType(dict(self.versions)))
        object.__setattr__(self, "details", MappingProxyType(dict(self.details)))


@dataclass(frozen=True, slots=True)
class Usable:
    """Whether a backend works on this machine; if not, why and what to do about it."""

    usable: bool
    reason: str = ""
    remedy: str = ""
    version: str = ""


class Engine(Protocol):
    """A built model that runs; use it in `with`, which frees what it holds."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The model's inputs, in its order."""

    @property
    def outputs(self) -> tuple[InputSpec, ...]:
        """The model's outputs, in its order, with the same three facts as inputs."""

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every output by name for one batch; the arrays are the caller's to keep.

        Raises DataError if an input is missing, or has another dtype or shape than the model's.
        """


class Backend(Protocol):
    """A runtime with one way of lowering: builds engines from candidates, and loads them."""

    @property
    def name(self) -> str:
        """Runtime and lowering, such as "onnxruntime/emulate"; `BuildInfo.backend`."""

    @property
    def lowering(self) -> str:
        """The key in `LOWERINGS` of how it writes a plan: says which tensors need scales."""

    @property
    def versions(self) -> Mapping[str, str]:
        """What an engine depends on; TrtuneError if the runtime is not installed."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What a build is asked for beside the candidate; `BuildInfo.details["settings"]`."""

    def obstacle(self) -> str:
        """Why engines of this backend cannot run on this machine; empty if they can."""

    def build(self, candidate: Candidate, folder: Path) -> BuildInfo:
        """Lower and build `candidate`; `folder` then holds the engine and its engine.json.

        Raises TrtuneError if that is impossible; `folder` then holds no half-written file.
        """

    def load(self, folder: Path) -> Engine:
        """The engine that `build` put into `folder`."""

    def doctor(self) -> Usable:
        """Whether this backend works here; never raises."""
