"""onnxruntime on the CPU as a backend.

The default runtime: every stage works with it on any machine. Two lowerings: `emulate` keeps the
Q/DQ pairs that TensorRT would read, `deploy` writes them so that onnxruntime's own integer kernels
take their place.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import onnx
import onnxruntime as ort

from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import TrtuneError
from trtune.configs.system.machine import has_matrix_units, package_version
from trtune.precision.backends.ort.readback import read_precisions
from trtune.precision.graph.file import Model, save_model, tensor_spec
from trtune.precision.graph.proto import without_weights
from trtune.precision.graph.view import GraphView
from trtune.precision.lower.deploy import NO_FLOAT8
from trtune.precision.lower.half_on_cpu import in_float32
from trtune.precision.lower.tiles import use_matrix_units
from trtune.precision.runtime.api import MODEL_FILE, BuildInfo, Candidate, Usable
from trtune.precision.runtime.engine_json import read_engine_json, write_engine_json
from trtune.precision.runtime.not_honoured import not_honoured
from trtune.precision.runtime.session import OrtEngine, make_session, optimized_graph

Lowering = Literal["emulate", "deploy"]


class OnnxruntimeBackend:
    """onnxruntime with one of its two lowerings; `threads` None leaves the number to it.

    `device` is where engines run; integer kernels (`deploy`) are those of the CPU.
    """

    def __init__(
        self, lowering: Lowering = "emulate", *, threads: int | None = None, device: str = "cpu"
    ) -> None:
        self.lowering = lowering
        self.threads = threads
        self.device = device

    @property
    def name(self) -> str:
        """ "onnxruntime/emulate" or "onnxruntime/deploy"."""
        return f"onnxruntime/{self.lowering}"

    @property
    def versions(self) -> dict[str, str]:
        """What the built model depends on."""
        return {name: package_version(name) for name in ("onnx", "onnxruntime", "trtune")}

    @property
    def settings(self) -> dict[str, Any]:
        """Whether weights are written for a CPU's matrix units; threads change how fast a model
        runs, not what is written."""
        return {"matrix_units": True} if self._for_matrix_units else {}

    @property
    def _for_matrix_units(self) -> bool:
        return self.lowering == "deploy" and has_matrix_units()

    def obstacle(self) -> str:
        """Empty: a CPU is everywhere."""
        return ""

    def build(self, candidate: Candidate, folder: Path) -> BuildInfo:
        """Lower `candidate` into `folder/model.onnx`, check it, and read back what runs in what.

        With `deploy`, `precisions` is read from the graph that onnxruntime itself runs; with
        `emulate` the Q/DQ pairs are the precision, and it is the plan's.

        Raises TrtuneError if the lowered model is invalid, has other inputs or outputs, or cannot
        be written.
        """
        from trtune.precision.lower.emulate import LOWERINGS

        start = time.perf_counter()
        model, plan = candidate.model, candidate.plan
        table = candidate.table or CalibrationTable({})
        proto = LOWERINGS[self.lowering](model, plan, table)
        if self._for_matrix_units:
            use_matrix_units(proto, GraphView.of(model).shapes)
        _check_lowered(model, proto, self.name)
        path = folder / MODEL_FILE
        save_model(proto, path, model.external_dir)
        planned = {name: plan.precision(name) for name in plan.compute_nodes}
        precisions = planned
        if self.lowering == "deploy":
            precisions = read_precisions(model.proto, proto, optimized_graph(path))
        info = BuildInfo(
            backend=self.name,
            path=path,
            size_bytes=sum(file.stat().st_size for file in folder.glob(f"{MODEL_FILE}*")),
            precisions=precisions,
            not_honoured=not_honoured(
                planned, precisions, dict.fromkeys(plan.fp8_nodes, NO_FLOAT8)
            ),
            seconds=time.perf_counter() - start,
            versions=self.versions,
        )
        write_engine_json(folder, info, candidate)
        return info

    def load(self, folder: Path) -> OrtEngine:
        """The engine in `folder`; its session is made on entering it.

        Raises TrtuneError if the folder holds none.
        """
        try:
            path = read_engine_json(folder).path
        except (OSError, ValueError, KeyError) as error:
            raise TrtuneError(
                f"{folder} holds no built engine ({error}); build it first"
            ) from error
        if path is None or not path.is_file():
            raise TrtuneError(f"{folder} holds no model file; build it again")
        integer = self.lowering == "deploy"
        return OrtEngine(
            lambda: make_session(
                _runnable(path),
                threads=self.threads,
                device=self.device,
                integer_kernels=integer,
                external_dir=path.parent,
            ),
            self.name,
        )

    def doctor(self) -> Usable:
        """Always usable: onnxruntime's CPU provider is part of every build of it."""
        return Usable(True, version=ort.__version__)


def _check_lowered(model: Model, proto: onnx.ModelProto, backend: str) -> None:
    try:
        onnx.checker.check_model(without_weights(proto))
    except onnx.checker.ValidationError as error:
        raise TrtuneError(
            f"the lowering for {backend} made an invalid model of {model.path}: "
            f"{' '.join(str(error).split())[:400]}"
        ) from error
    for role, before, after in (
        ("input", model.proto.graph.input, proto.graph.input),
        ("output", model.proto.graph.output, proto.graph.output),
    ):
        was, now = ([(i.name, tensor_spec(i)) for i in infos] for infos in (before, after))
        if was != now:
            raise TrtuneError(
                f"the lowering for {backend} changed the {role}s of {model.path}: {was} to {now}"
            )


def _runnable(path: Path) -> Path | onnx.ModelProto:
    """The model at `path`, with what is half in it computed as a GPU does."""
    light = onnx.load(path, load_external_data=False)
    emulated = in_float32(light)
    return path if emulated is light else emulated
