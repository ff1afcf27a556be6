"""For onnxruntime on a GPU: options of its TensorRT and TensorRT-RTX providers, and its table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from trtune.calibrate.provider_table import dump_provider_table
from trtune.configs.files import write_bytes, write_text
from trtune.export.bundle import Bundle, implicit_plan
from trtune.export.files import (
    FP32_FILE,
    QDQ_FILE,
    DeviceStep,
    Export,
    cache_notes,
    shapes_text,
    write_fp32,
    write_qdq,
)
from trtune.precision.backends.trt.weak import enabled_precisions

TABLE_FILE, OPTIONS_FILE, SCRIPT = "calibration.flatbuffers", "providers.json", "load.py"
TENSORRT, RTX, CUDA = (
    "TensorrtExecutionProvider",
    "NvTensorRTRTXExecutionProvider",
    "CUDAExecutionProvider",
)
LEVELS = 127
"""A scale times this is the largest magnitude, which the provider's table holds."""

LOAD = '''"""Load the exported model with onnxruntime, by one of the entries of providers.json.

    python load.py tensorrt-qdq | tensorrt-table | tensorrt-rtx
"""

import json
import sys
from pathlib import Path

import onnxruntime

FOLDER = Path(__file__).resolve().parent


def load(choice: str) -> onnxruntime.InferenceSession:
    """A session; raises RuntimeError if this onnxruntime has not the provider."""
    entry = json.loads((FOLDER / "providers.json").read_text("utf-8"))[choice]
    provider = entry["provider"]
    if provider not in onnxruntime.get_available_providers():
        raise RuntimeError(
            f"this onnxruntime has no {provider}, only "
            + ", ".join(onnxruntime.get_available_providers())
        )
    options = {
        key: str(FOLDER) if key in entry["folders"] else value
        for key, value in entry["options"].items()
    }
    fallback = [p for p in entry["fallback"] if p in onnxruntime.get_available_providers()]
    return onnxruntime.InferenceSession(
        FOLDER / entry["model"], providers=[(provider, options), *fallback]
    )


if __name__ == "__main__":
    session = load(sys.argv[1] if len(sys.argv) > 1 else "tensorrt-qdq")
    print(session.get_providers())
    for role, tensors in (("input", session.get_inputs()), ("output", session.get_outputs())):
        for tensor in tensors:
            print(role, tensor.name, tensor.type, tensor.shape)
'''


def write_ort(bundle: Bundle, folder: Path) -> Export:
    """Write the models, the table (FlatBuffers), the providers' options and a script."""
    write_qdq(bundle, folder / QDQ_FILE, to_end=False)
    write_fp32(bundle, folder / FP32_FILE, to_end=False)
    files = [QDQ_FILE, FP32_FILE, OPTIONS_FILE, SCRIPT]
    notes = [
        "TensorrtExecutionProvider has no options for the precision of single layers: the table "
        "knows no pins. The Q/DQ model holds them, so it is the one to take.",
        "Its own reader of TensorRT's cache splits lines at the first colon; the FlatBuffers table "
        "has no such limit.",
    ]
    if bundle.cache is not None:
        ranges = {name: scale * LEVELS for name, scale in bundle.cache.scales.items()}
        write_bytes(folder / TABLE_FILE, dump_provider_table(ranges))
        files.append(TABLE_FILE)
        notes += cache_notes(bundle)
    write_text(folder / OPTIONS_FILE, json.dumps(provider_options(bundle), indent=2) + "\n")
    write_text(folder / SCRIPT, LOAD)
    steps = [
        DeviceStep("TensorRT, the Q/DQ model", f"python {SCRIPT} tensorrt-qdq"),
        DeviceStep("TensorRT-RTX, the Q/DQ model", f"python {SCRIPT} tensorrt-rtx"),
    ]
    if bundle.cache is not None:
        step = DeviceStep(
            "TensorRT 10, the FP32 model and the table", f"python {SCRIPT} tensorrt-table"
        )
        steps.append(step)
    return Export("ort", folder, tuple(files), tuple(steps), tuple(notes))


def provider_options(bundle: Bundle) -> dict[str, dict[str, object]]:
    """Choice -> model, provider and its options; those in `folders` become the export's folder."""
    halves = {f"trt_{kind}_enable": "1" for kind in bundle.plan.halves}
    trt = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": ".",
        "trt_timing_cache_enable": "1",
        **_profiles(bundle, "trt"),
    }
    eight = {"trt_int8_enable": "1"} if bundle.plan.int8_nodes else {}
    rtx = {"nv_runtime_cache_path": ".", **_profiles(bundle, "nv")}
    found = {
        "tensorrt-qdq": _entry(QDQ_FILE, TENSORRT, {**trt, **eight, **halves}),
        "tensorrt-rtx": _entry(QDQ_FILE, RTX, rtx),
    }
    if bundle.cache is not None:
        enabled = {
            f"trt_{kind}_enable": "1" for kind in enabled_precisions(implicit_plan(bundle.plan))
        }
        table = {
            "trt_int8_calibration_table_name": TABLE_FILE,
            "trt_int8_use_native_calibration_table": "0",
        }
        found["tensorrt-table"] = _entry(FP32_FILE, TENSORRT, {**trt, **enabled, **table})
    return found


def _entry(model: str, provider: str, options: Mapping[str, str]) -> dict[str, object]:
    folders = [key for key, value in options.items() if value == "."]
    return {
        "model": model,
        "provider": provider,
        "options": dict(options),
        "folders": folders,
        "fallback": [CUDA, "CPUExecutionProvider"],
    }


def _profiles(bundle: Bundle, prefix: str) -> dict[str, str]:
    if not bundle.profiles:
        return {}
    sizes = {name: profile.to_json() for name, profile in bundle.profiles.items()}
    return {
        f"{prefix}_profile_{word}_shapes": shapes_text({n: size[word] for n, size in sizes.items()})
        for word in ("min", "opt", "max")
    }
