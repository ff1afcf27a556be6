"""For Polygraphy: a script that compares the exported models, and builds where TensorRT is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import InputError
from trtune.configs.files import atomic_path, write_text
from trtune.datasets.open import open_section
from trtune.export.bundle import Bundle, implicit_plan
from trtune.export.files import (
    CACHE_NAME,
    FP32_FILE,
    QDQ_FILE,
    DeviceStep,
    Export,
    cache_notes,
    write_cache,
    write_fp32,
    write_qdq,
)

SCRIPT, SETTINGS_FILE, INPUTS_FILE = "compare.py", "settings.json", "inputs.npz"

COMPARE = '''"""Compare the exported models with Polygraphy, and engines of them where TensorRT is.

    python compare.py                the Q/DQ model with FP32, in onnxruntime
    python compare.py --tensorrt     and a TensorRT engine of the Q/DQ model
    python compare.py --cache        and a TensorRT 10 engine of the FP32 model, cache and pins
"""

import argparse
import json
from pathlib import Path

import numpy as np
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator

FOLDER = Path(__file__).resolve().parent
SETTINGS = json.loads((FOLDER / "settings.json").read_text("utf-8"))


def batches():
    """The samples of inputs.npz, as one batch."""
    with np.load(FOLDER / "inputs.npz") as arrays:
        yield {name: arrays[name] for name in arrays.files}


def profiles():
    """The shapes that an engine is to take."""
    from polygraphy.backend.trt import Profile

    profile = Profile()
    for name, shape in SETTINGS["profiles"].items():
        profile.add(name, min=shape["min"], opt=shape["opt"], max=shape["max"])
    return [profile]


def explicit():
    """A runner of the Q/DQ model, strongly typed."""
    from polygraphy.backend.trt import (
        CreateConfig,
        EngineFromNetwork,
        NetworkFromOnnxPath,
        TrtRunner,
    )

    network = NetworkFromOnnxPath(str(FOLDER / SETTINGS["qdq"]), strongly_typed=True)
    engine = EngineFromNetwork(network, CreateConfig(profiles=profiles()))
    return TrtRunner(engine, name="tensorrt-qdq")


def implicit():
    """A runner of the FP32 model with calibration cache and pins: TensorRT 10 and before."""
    import tensorrt as trt
    from polygraphy.backend.trt import (
        Calibrator,
        CreateConfig,
        EngineFromNetwork,
        NetworkFromOnnxPath,
        SetLayerPrecisions,
        TrtRunner,
    )

    kinds = {"fp32": trt.float32, "fp16": trt.float16, "bf16": getattr(trt, "bfloat16", None)}
    network = NetworkFromOnnxPath(str(FOLDER / SETTINGS["fp32"]))
    pins = {name: kinds[kind] for name, kind in SETTINGS["pins"].items()}
    enabled = SETTINGS["enabled"]
    config = CreateConfig(
        profiles=profiles(),
        int8="int8" in enabled,
        fp16="fp16" in enabled,
        bf16="bf16" in enabled,
        calibrator=Calibrator(list(batches()), cache=str(FOLDER / SETTINGS["cache"])),
        precision_constraints=SETTINGS["constraints"] if pins else None,
    )
    if pins:
        network = SetLayerPrecisions(network, pins)
    return TrtRunner(EngineFromNetwork(network, config), name="tensorrt-cache")


def main():
    """Run, and print the SQNR of every output against the first runner, in decibels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensorrt", action="store_true")
    parser.add_argument("--cache", action="store_true")
    given = parser.parse_args()
    runners = [
        OnnxrtRunner(SessionFromOnnx(str(FOLDER / SETTINGS[kind])), name=f"onnxruntime-{kind}")
        for kind in ("fp32", "qdq")
    ]
    runners += [explicit()] if given.tensorrt else []
    runners += [implicit()] if given.cache else []
    results = Comparator.run(runners, data_loader=list(batches()))
    (_, reference), *others = results.items()
    for name, iterations in others:
        for expected, found in zip(reference, iterations):
            for output in expected:
                signal = np.asarray(expected[output], dtype=np.float64)
                noise = np.asarray(found[output], dtype=np.float64) - signal
                power = (noise**2).sum()
                sqnr = 10 * np.log10((signal**2).sum() / power) if power else np.inf
                print(f"{name}: {output}: SQNR {sqnr:.2f} dB")


if __name__ == "__main__":
    main()
'''


def write_polygraphy(bundle: Bundle, folder: Path) -> Export:
    """Write the models, the cache, a batch of the evaluation data and the script."""
    write_qdq(bundle, folder / QDQ_FILE, to_end=False)
    write_fp32(bundle, folder / FP32_FILE, to_end=False)
    files = [SCRIPT, SETTINGS_FILE, INPUTS_FILE, QDQ_FILE, FP32_FILE]
    has_cache = write_cache(bundle, folder / CACHE_NAME)
    if has_cache:
        files.append(CACHE_NAME)
    arrays, notes = _samples(bundle)
    with atomic_path(folder / INPUTS_FILE) as target, target.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    write_text(folder / SETTINGS_FILE, json.dumps(script_settings(bundle), indent=2) + "\n")
    write_text(folder / SCRIPT, COMPARE)
    steps = [
        DeviceStep("Compare in onnxruntime", f"python {SCRIPT}"),
        DeviceStep("And a TensorRT engine of the Q/DQ model", f"python {SCRIPT} --tensorrt"),
    ]
    if has_cache:
        step = DeviceStep("And one of cache and pins (TensorRT 10)", f"python {SCRIPT} --cache")
        steps.append(step)
    notes += cache_notes(bundle)
    return Export("polygraphy", folder, tuple(files), tuple(steps), tuple(notes))


def script_settings(bundle: Bundle) -> dict[str, Any]:
    """What the script is told of the run."""
    from trtune.precision.backends.trt.weak import enabled_precisions

    return {
        "fp32": FP32_FILE,
        "qdq": QDQ_FILE,
        "cache": CACHE_NAME,
        "enabled": list(enabled_precisions(implicit_plan(bundle.plan))),
        "pins": bundle.constrained,
        "constraints": bundle.settings.constraints,
        "profiles": {name: profile.to_json() for name, profile in bundle.profiles.items()},
    }


def _samples(bundle: Bundle) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """A batch of the evaluation data; where that is not there any more, random numbers."""
    inputs = bundle.model.inputs
    try:
        batch = next(iter(open_section(bundle.config.data.evaluation, inputs)), None)
    except InputError as error:
        batch, why = None, str(error)
    else:
        why = "it holds no sample"
    if batch is not None:
        return dict(batch.feeds), []
    draw = np.random.default_rng(0)
    arrays = {}
    for spec in inputs:
        profile = bundle.profiles.get(spec.name)
        shape = profile.opt if profile else tuple(d for d in spec.shape if isinstance(d, int))
        arrays[spec.name] = draw.uniform(0, 1, shape).astype(spec.dtype)
    return arrays, [f"{INPUTS_FILE} holds random numbers, as the evaluation data is gone: {why}"]
