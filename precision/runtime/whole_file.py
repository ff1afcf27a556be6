"""The model that is deployed where onnxruntime lacks an operator: with the nodes behind the cut.

Engines are built, judged and timed up to the cut, so that their outputs can be compared; beside
each stands `whole.onnx`, the same model with TensorRT's plugins in their place again, and where the
builder has these plugins `whole.plan`, the engine of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from trtune.datasets.batches import InputSpec
from trtune.precision.graph.cut import whole
from trtune.precision.graph.file import Model, save_model, tensor_spec
from trtune.precision.runtime.api import MODEL_FILE

WHOLE_FILE, WHOLE_PLAN = "whole.onnx", "whole.plan"


def whole_inputs(model: Model) -> tuple[InputSpec, ...]:
    """The inputs of the file behind `model`: also those that only what was cut off reads."""
    if model.tail is None:
        return model.inputs
    known = {spec.name: spec for spec in model.inputs}
    specs = {info.name: tensor_spec(info) for info in model.tail.inputs}
    found = (known.get(name, spec) for name, spec in specs.items())
    return tuple(spec for spec in found if spec is not None)


def write_whole(model: Model, folder: Path, command: Callable[[Path], str]) -> dict[str, Any]:
    """Write `folder/whole.onnx` from the lowered model beside it, if `model` was cut.

    Gives what engine.json tells of it: file, operators, and the `command` that builds it; nothing,
    and no such file is left, for a model that was not cut.
    """
    path = folder / WHOLE_FILE
    if model.tail is None:
        path.unlink(missing_ok=True)
        return {}
    lowered = onnx.load(folder / MODEL_FILE, load_external_data=False)
    save_model(whole(lowered, model.tail), path, folder)
    told = {
        "file": WHOLE_FILE,
        "operators": list(model.tail.operators),
        "command": command(Path(WHOLE_FILE)),
    }
    return {"whole": told}
