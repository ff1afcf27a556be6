"""Outputs of two models as Polygraphy keeps them, for its own tools.

`polygraphy inspect data` shows such a file, and `polygraphy run --load-outputs` compares with it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from trtune.configs.files import atomic_path
from trtune.datasets.batches import BatchSource
from trtune.precision.compare.batches import infer, limited, no_samples
from trtune.precision.runtime.api import Engine

FEW_PICTURES = 4
"""Pictures that are kept if nobody says how many: outputs of a detector take megabytes each."""


def save_run_results(
    path: Path, engines: Mapping[str, Engine], source: BatchSource, *, pictures: int = FEW_PICTURES
) -> None:
    """Write the outputs of `engines`, by name and entered, on the first `pictures` to `path`.

    A JSON file that Polygraphy's `RunResults.load` reads, written in one step: an iteration a
    batch, with the time left out. Raises DataError if there are no samples, TrtuneError if it
    cannot be written.
    """
    from polygraphy.comparator import IterationResult, RunResults
    from polygraphy.logger import G_LOGGER

    iterations: dict[str, list[Any]] = {name: [] for name in engines}
    for batch in limited(source, pictures):
        for name, engine in engines.items():
            outputs: Mapping[str, NDArray[Any]] = infer(engine, batch)
            iterations[name].append(IterationResult(dict(outputs), runner_name=name))
    if not all(iterations.values()):
        raise no_samples()
    results = RunResults()
    results.extend(iterations.items())
    with atomic_path(path) as target, G_LOGGER.verbosity(G_LOGGER.ERROR):
        results.save(str(target))


def polygraphy_run(model: Path, outputs: Path, *, tensors: Sequence[str] = ()) -> str:
    """The `polygraphy run` line that runs `model` in onnxruntime and compares with `outputs`.

    `tensors` are marked as outputs; without any, the model's own are compared.

    >>> polygraphy_run(Path("net.onnx"), Path("outputs.json"), tensors=["conv1"])
    'polygraphy run net.onnx --onnxrt --load-outputs outputs.json --onnx-outputs conv1'
    """
    words = ["polygraphy", "run", str(model), "--onnxrt", "--load-outputs", str(outputs)]
    if tensors:
        words += ["--onnx-outputs", *tensors]
    return shlex.join(words)
