"""For Triton: a model repository with config.pbtxt, whose plan is built on the device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trtune.configs.errors import InputError
from trtune.configs.files import write_text
from trtune.datasets.batches import InputSpec
from trtune.export.bundle import Bundle
from trtune.export.files import QDQ_FILE, DeviceStep, Export, write_qdq
from trtune.export.trtexec import explicit_command

TYPES = {
    "bool": "TYPE_BOOL",
    **{f"uint{bits}": f"TYPE_UINT{bits}" for bits in (8, 16, 32, 64)},
    **{f"int{bits}": f"TYPE_INT{bits}" for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"TYPE_FP{bits}" for bits in (16, 32, 64)},
    "bfloat16": "TYPE_BF16",
}
QUEUE_MICROSECONDS = 100


def write_triton(bundle: Bundle, folder: Path) -> Export:
    """Write the repository, and the Q/DQ model beside it.

    Raises InputError for an input or output of a type that Triton has not.
    """
    name = bundle.record.name
    config = f"model_repository/{name}/config.pbtxt"
    write_qdq(bundle, folder / QDQ_FILE)
    write_text(folder / config, model_config(bundle))
    plan = f"model_repository/{name}/1/model.plan"
    (folder / plan).parent.mkdir(parents=True, exist_ok=True)
    steps = (
        DeviceStep(
            "Build the plan with the TensorRT of the server's container (11; with TensorRT 10 "
            "add --stronglyTyped)",
            explicit_command(bundle, 11, plan),
        ),
        DeviceStep("Serve it", 'tritonserver --model-repository="$PWD/model_repository"'),
    )
    notes = (
        "A plan runs with the TensorRT version that built it, on the GPU type that built it.",
        "The server batches requests up to max_batch_size, which is the profile's largest batch.",
    )
    return Export("triton", folder, (config, QDQ_FILE), steps, notes)


def model_config(bundle: Bundle) -> str:
    """The text of config.pbtxt (`inference.ModelConfig` in protobuf's text form)."""
    inputs, outputs = bundle.model.inputs, bundle.model.outputs
    largest, best = _batches(bundle)
    lines = [
        f"name: {_quoted(bundle.record.name)}",
        'platform: "tensorrt_plan"',
        f"max_batch_size: {largest}",
        *_tensors("input", inputs, batched=bool(largest)),
        *_tensors("output", outputs, batched=bool(largest)),
        "version_policy { latest { num_versions: 1 } }",
        "instance_group { count: 1 kind: KIND_GPU }",
    ]
    if largest:
        lines += [
            "dynamic_batching {",
            f"  preferred_batch_size: {best}",
            f"  max_queue_delay_microseconds: {QUEUE_MICROSECONDS}",
            "}",
        ]
    for key, value in bundle.metadata.items():
        text = f"{{ string_value: {_quoted(value)} }}"
        lines.append(f"parameters {{ key: {_quoted(key)} value: {text} }}")
    return "\n".join(lines) + "\n"


def _batches(bundle: Bundle) -> tuple[int, int]:
    """The largest batch and the one optimized for; zeros where not every first axis is free."""
    specs = (*bundle.model.inputs, *bundle.model.outputs)
    if not specs or not all(spec.shape and not isinstance(spec.shape[0], int) for spec in specs):
        return 0, 0
    profiles = [bundle.profiles[spec.name] for spec in bundle.model.inputs]
    if any(profile.min[0] != 1 for profile in profiles):  # the server forms batches from 1 on
        return 0, 0
    return min(p.max[0] for p in profiles), min(p.opt[0] for p in profiles)


def _tensors(role: str, specs: Sequence[InputSpec], *, batched: bool) -> list[str]:
    lines: list[str] = []
    for spec in specs:
        if spec.dtype not in TYPES:
            raise InputError(f"{role} {spec.name!r} is {spec.dtype}, a type that Triton has not")
        dims = [d if isinstance(d, int) else -1 for d in spec.shape[1 if batched else 0 :]]
        lines += [
            f"{role} {{",
            f"  name: {_quoted(spec.name)}",
            f"  data_type: {TYPES[spec.dtype]}",
            f"  dims: [ {', '.join(map(str, dims or [1]))} ]",
            *([] if dims else ["  reshape { shape: [ ] }"]),
            "}",
        ]
    return lines


def _quoted(text: str) -> str:
    """`text` as a string of protobuf's text form."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
