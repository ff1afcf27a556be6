"""Is FP32 right? Gates before anything is quantized: past one that fails, no number means a thing.

`fp32_gate` compares the prepared FP32 model with the user's own file, `half_gate` with one in
half precision, `engine_gate` an FP32 engine with the FP32 model in onnxruntime.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from trtune.configs.errors import ModelError, TrtuneError
from trtune.datasets.batches import Batch, BatchSource
from trtune.precision.compare.batches import add_batch, infer, limited, no_samples
from trtune.precision.graph.file import Model, comparable
from trtune.precision.graph.proto import all_nodes, copy_model
from trtune.precision.runtime.api import Backend, Engine
from trtune.precision.runtime.errors import ErrorSums
from trtune.precision.runtime.session import OrtEngine, make_session

log = logging.getLogger(__name__)

SAME_MODEL = 1e-5
"""Mean relative error above which the prepared model is another model than the file."""
FP32_ENGINE = 1e-3
"""Mean relative error above which an FP32 engine is not FP32; float noise is about 1e-6."""
FLOAT_NOISE = 1e-5
"""Relative L2 error that is float noise however large the error of the tiniest elements is."""
HALF_NOISE: Mapping[str, float] = {"float16": 0.1, "bfloat16": 0.4}
"""Relative L2 error above which a file in half precision and the same weights in float32 are two
models: deep networks lose up to a hundredth in float16, eight times that in bfloat16."""
STRINGS = "object"
"""NumPy's type of texts, such as names of classes, which differ by no number."""
TF32_ENGINE, TF32_NOISE = 1e-1, 1e-2
"""The same two for engines that may compute in TF32, whose mantissa has 10 bits and not 23."""


def fp32_gate(
    original: onnx.ModelProto | Path,
    normalised: onnx.ModelProto,
    source: BatchSource,
    *,
    pictures: int = 8,
    limit: float = SAME_MODEL,
    threads: int | None = None,
    external_dir: Path | None = None,
) -> dict[str, ErrorSums]:
    """The errors of the normalised FP32 model's outputs against the user's own file.

    Run before anything is quantized: if these differ, no later number means anything.
    `external_dir` is where external weights of protos are.

    An output whose mean relative error exceeds `limit` still passes with a relative L2 error of
    float noise: elements next to zero may differ by all that they are, as where batch norms were
    folded before a sigmoid of almost 0.

    Raises ModelError if an output passes neither, or the original gives NaN or Inf; DataError if
    there are no samples.
    """
    engines = (
        OrtEngine(lambda: _original_session(original, threads, external_dir)),
        OrtEngine(lambda: make_session(normalised, threads=threads, external_dir=external_dir)),
    )
    with engines[0] as exact, engines[1] as tested:
        sums, _ = _summed(exact, tested, source, pictures)
    for name, total in sums.items():
        if not (total.mean_relative <= limit or total.relative_l2 <= FLOAT_NOISE):
            raise ModelError(
                f"output {name!r} of the prepared FP32 model differs from the original file: mean "
                f"relative error {total.mean_relative:.2g} (relative L2 {total.relative_l2:.2g}), "
                f"at most {limit:.0e} is float noise. "
                "Nothing was quantized yet; please report this with the model"
            )
        log.info("FP32 gate: %s differs by %.1e on average", name, total.mean_relative)
    return sums


def model_gate(model: Model, source: BatchSource) -> dict[str, ErrorSums]:
    """`fp32_gate` of a loaded model against its file, as far as onnxruntime can run that.

    Empty for an opset so old that onnxruntime has no operators of it: there is nothing to compare
    with. A file in half precision is compared by `half_gate`. Raises what they raise.
    """
    reference = comparable(model)
    if reference is None:
        log.warning("%s: onnxruntime runs no opset below 7, so not compared with it", model.path)
        return {}
    if model.half:
        return half_gate(reference, model, source)
    folder = model.path.parent  # of external weights, the file's own and those still outside
    return fp32_gate(reference, model.proto, source, external_dir=folder)


def half_gate(
    reference: onnx.ModelProto | Path, model: Model, source: BatchSource, *, pictures: int = 8
) -> dict[str, ErrorSums]:
    """The errors of `model`, raised to float32, against its file in half precision, by output.

    Outputs of integers are left out: they follow from floats, and one digit decides. Where the file
    gives NaN or Inf the elements are left out too, with a warning: in float32 nothing overflows.
    Empty if onnxruntime cannot run the file (bfloat16 on a CPU).

    Raises ModelError if an output differs by more than half precision explains (`HALF_NOISE`),
    DataError if there are no samples.
    """
    folder = model.path.parent
    file = OrtEngine(lambda: _original_session(reference, None, folder))
    raised = OrtEngine(lambda: make_session(model.proto, external_dir=folder))
    names = [spec.name for spec in model.outputs if "float" in spec.dtype]
    try:
        with file as exact, raised as tested:
            sums, lost = _finite_sums(exact, tested, names, limited(source, pictures))
    except ModelError as error:
        log.warning("%s cannot be compared with what it is in float32: %s", model.path, error)
        return {}
    if lost:
        log.warning(
            "%s gives %s NaN or infinite values in %s, which in float32 are finite: it overflows",
            model.path, lost, model.half,
        )  # fmt: skip
    limit = HALF_NOISE[model.half]
    for name, total in sums.items():
        if not (total.relative_l2 <= limit or total.mean_relative <= limit):
            raise ModelError(
                f"output {name!r} of the model in float32 differs from the file's {model.half} by "
                f"a relative L2 error of {total.relative_l2:.2g}, and {limit:g} is the most that "
                f"{model.half} explains: the file overflows or loses its digits on these data. "
                "Export it in float32, so that there is one right result"
            )
        log.info("gate: %s in float32 and in the file's %s differ by %.1e", name, model.half,
                 total.relative_l2)  # fmt: skip
    return sums


def _finite_sums(
    reference: Engine, tested: Engine, names: Sequence[str], batches: Iterable[Batch]
) -> tuple[dict[str, ErrorSums], int]:
    """Errors over what is finite in the reference, and how many values are so in `tested` alone."""
    sums = {name: ErrorSums() for name in names}
    seen = lost = 0
    for batch in batches:
        exact, test = infer(reference, batch), infer(tested, batch)
        seen += len(batch)
        for name in names:
            r, t = exact[name], test[name]
            if r.shape == t.shape:  # else its number of rows follows the data
                finite = np.isfinite(r)
                lost += int(np.count_nonzero(np.isfinite(t) & ~finite))
                sums[name] = sums[name].add(r[finite], t[finite])
    if not seen:
        raise no_samples()
    return sums, lost


def _original_session(
    model: onnx.ModelProto | Path, threads: int | None, external_dir: Path | None
) -> ort.InferenceSession:
    if isinstance(model, Path):
        external_dir = None
    try:
        return make_session(model, threads=threads, external_dir=external_dir)
    except ModelError:
        # onnxruntime refuses files with repeated node names, which mean nothing to the values.
        if isinstance(model, Path):
            nameless, external_dir = onnx.load(model, load_external_data=False), model.parent
        else:
            nameless = copy_model(model)
        for node in all_nodes(nameless.graph.node):
            node.ClearField("name")
        return make_session(nameless, threads=threads, external_dir=external_dir)


def engine_gate(
    reference: Engine,
    engine: Engine,
    source: BatchSource,
    *,
    pictures: int,
    backend: str,
    limit: float = FP32_ENGINE,
    noise: float = FLOAT_NOISE,
) -> dict[str, ErrorSums]:
    """The errors of an FP32 engine's outputs against the FP32 model in onnxruntime.

    Both engines must be entered. An output passes if its mean relative error is at most `limit`,
    or its relative L2 error at most `noise`: elements next to zero may differ by all that they are.
    `backend` is for the message.

    Raises TrtuneError, naming the output, if one does not pass; ModelError for NaN or Inf in the
    reference or other shapes, DataError if there are no samples.
    """
    sums, seen = _summed(reference, engine, source, pictures)
    for name, total in sums.items():
        if not (total.mean_relative <= limit or total.relative_l2 <= noise):
            raise TrtuneError(
                f"the FP32 engine of {backend} is not the FP32 model: output {name!r} differs from "
                f"onnxruntime by a mean relative error of {total.mean_relative:.2g} (relative L2 "
                f"{total.relative_l2:.2g}) over {seen} pictures, at most {limit:.0e} passes and "
                "about 1e-06 is usual. Nothing quantized can be judged by it: leave `tf32` off, "
                "delete the timing cache, set a lower `optimization_level`; if it stays, another "
                f"version of {backend} may compile the model rightly"
            )
        log.info("FP32 gate of %s: %s differs by %.1e on average", backend, name,
                 total.mean_relative)  # fmt: skip
    return sums


def gate_limits(settings: Mapping[str, Any]) -> tuple[float, float]:
    """`limit` and `noise` of `engine_gate` for a backend with these settings.

    >>> gate_limits({"tf32": False})
    (0.001, 1e-05)
    """
    return (TF32_ENGINE, TF32_NOISE) if settings.get("tf32") else (FP32_ENGINE, FLOAT_NOISE)


def gate_errors(
    model: Model, backend: Backend, folder: Path, source: BatchSource, *, pictures: int
) -> dict[str, ErrorSums]:
    """Errors of the FP32 engine that `backend` built in `folder` against onnxruntime, by output.

    Raises TrtuneError if it is not the FP32 model.
    """
    limit, noise = gate_limits(backend.settings)
    reference = OrtEngine(lambda: make_session(model.proto, external_dir=model.external_dir))
    with reference as exact, backend.load(folder) as engine:
        return engine_gate(
            exact,
            engine,
            source,
            pictures=pictures,
            backend=backend.name,
            limit=limit,
            noise=noise,
        )


def _summed(
    reference: Engine, tested: Engine, source: BatchSource, pictures: int
) -> tuple[dict[str, ErrorSums], int]:
    """Errors of each output over the first `pictures`, and how many; DataError without any."""
    sums = {spec.name: ErrorSums() for spec in reference.outputs if spec.dtype != STRINGS}
    seen = 0
    for batch in limited(source, pictures):
        sums = add_batch(sums, reference, tested, batch)
        seen += len(batch)
    if not seen:
        raise no_samples()
    return sums, seen
