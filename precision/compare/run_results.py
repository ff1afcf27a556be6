"""Inputs and outputs of models as Polygraphy keeps them, for its own tools.

`polygraphy inspect data` shows such a file, and `polygraphy run --load-inputs --load-outputs` gives
a model the same inputs and compares what it makes of them.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trtune.configs.files import atomic_path
from trtune.datasets.batches import Batch, BatchSource, batch_size, fit_batch
from trtune.precision.compare.batches import limited, no_samples
from trtune.precision.runtime.api import Engine

FEW_PICTURES = 4
"""Pictures that are kept, if ..."""
LIGHT = 16 << 20
"""... inputs and outputs of so many take no more bytes than this."""
ENGINE_SUFFIX = ".plan"


def few_batches(
    engine: Engine, source: BatchSource, *, pictures: int = FEW_PICTURES, limit: int = LIGHT
) -> list[Batch]:
    """The first `pictures` of `source`, in batches that `engine` (entered) takes.

    Fewer, but one at least, where their inputs and outputs have more than `limit` bytes. Where the
    model fixes a batch size, pictures fill it up by being repeated. Raises DataError if there are
    none.
    """
    found = _fitted(engine, source, pictures)
    if not found:
        raise no_samples()
    total = sum(
        array.nbytes
        for b in found
        for array in (*b.feeds.values(), *engine.infer(b.feeds).values())
    )
    fewer = max(1, pictures * limit // max(total, 1))
    return found if fewer >= pictures else _fitted(engine, source, fewer)


def _fitted(engine: Engine, source: BatchSource, pictures: int) -> list[Batch]:
    return [
        fit_batch(b, batch_size(engine.inputs, len(b), b.axes)) for b in limited(source, pictures)
    ]


def save_inputs(path: Path, batches: Sequence[Batch]) -> None:
    """Write the feeds of `batches` to `path`, as `polygraphy run --load-inputs` reads them.

    Written in one step. Raises TrtuneError if it cannot be written.
    """
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    feeds = [{n: np.ascontiguousarray(a) for n, a in batch.feeds.items()} for batch in batches]
    with atomic_path(path) as target, G_LOGGER.verbosity(G_LOGGER.ERROR):
        save_json(feeds, str(target), description="inputs")


def save_run_results(path: Path, engines: Mapping[str, Engine], batches: Sequence[Batch]) -> None:
    """Write the outputs of `engines`, by name and entered, for `batches` to `path`.

    A JSON file that Polygraphy's `RunResults.load` reads, written in one step: an iteration a
    batch, with the time left out. Raises TrtuneError if it cannot be written.
    """
    from polygraphy.comparator import IterationResult, RunResults
    from polygraphy.logger import G_LOGGER

    iterations: dict[str, list[Any]] = {name: [] for name in engines}
    for batch in batches:
        for name, engine in engines.items():
            found = engine.infer(batch.feeds)
            outputs = {n: a for n, a in found.items() if a.dtype.kind != "O"}  # texts have no form
            iterations[name].append(IterationResult(outputs, runner_name=name))
    results = RunResults()
    results.extend(iterations.items())
    with atomic_path(path) as target, G_LOGGER.verbosity(G_LOGGER.ERROR):
        results.save(str(target))


def polygraphy_run(
    model: Path, outputs: Path, *, inputs: Path | None = None, tensors: Sequence[str] = ()
) -> str:
    """The `polygraphy run` line that runs `model` and compares with `outputs`.

    An ONNX file runs in onnxruntime, an engine (.plan) in TensorRT. Without `inputs` Polygraphy
    makes some up. `tensors` are marked as outputs; without any, the model's own are compared.

    >>> polygraphy_run(Path("net.onnx"), Path("outputs.json"), tensors=["conv1"])
    'polygraphy run net.onnx --onnxrt --load-outputs outputs.json --onnx-outputs conv1'
    >>> polygraphy_run(Path("a.plan"), Path("out.json"), inputs=Path("in.json"))
    'polygraphy run a.plan --model-type engine --trt --load-inputs in.json --load-outputs out.json'
    """
    how = ["--model-type", "engine", "--trt"] if model.suffix == ENGINE_SUFFIX else ["--onnxrt"]
    given = ["--load-inputs", inputs.as_posix()] if inputs is not None else []
    words = ["polygraphy", "run", model.as_posix(), *how, *given]
    words += ["--load-outputs", outputs.as_posix()]
    if tensors:
        words += ["--onnx-outputs", *tensors]
    return shlex.join(words)
