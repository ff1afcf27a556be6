"""What engines of every TensorRT have in common: the GPU in this machine, and shape profiles."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from trtune.configs.errors import ConfigError, DataError, did_you_mean
from trtune.datasets.batches import InputSpec
from trtune.precision.graph.file import Model
from trtune.precision.runtime.whole_file import whole_inputs

QUERY = ("--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader")
_Shapes = Mapping[str, Sequence[int]]

LEAST_MAX = 32
"""The largest batch of a profile that nobody asked for holds at least this many samples."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """An NVIDIA GPU: its name, compute capability ("8.9") and driver version."""

    name: str
    compute_capability: str
    driver: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability}, driver {self.driver})"


def find_gpu(program: str = "nvidia-smi") -> Gpu | None:
    """The first NVIDIA GPU, as nvidia-smi tells; None if there is none. Never raises."""
    found = shutil.which(program)
    if found is None:
        return None
    try:
        done = subprocess.run([found, *QUERY], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    fields = [field.strip() for field in done.stdout.split("\n", 1)[0].rsplit(",", 2)]
    if done.returncode or len(fields) != 3:
        return None
    return Gpu(*fields)


@dataclass(frozen=True, slots=True)
class Profile:
    """The shapes of one input that an engine takes: smallest, optimized for, largest."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def to_json(self) -> dict[str, list[int]]:
        """`{"min": [...], "opt": [...], "max": [...]}`."""
        return {"min": list(self.min), "opt": list(self.opt), "max": list(self.max)}

    @classmethod
    def from_json(cls, value: Mapping[str, Sequence[int]]) -> Profile:
        """Read what `to_json` gave. Raises KeyError if one of the three is missing."""
        return cls(tuple(value["min"]), tuple(value["opt"]), tuple(value["max"]))


def own_shapes(model: Model, shapes: Mapping[str, _Shapes]) -> dict[str, _Shapes]:
    """`shapes` without those of inputs that only what was cut off reads."""
    behind = {spec.name for spec in whole_inputs(model)} - {spec.name for spec in model.inputs}
    return {name: shape for name, shape in shapes.items() if name not in behind}


def model_profiles(
    model: Model, shapes: Mapping[str, _Shapes], *, batch: int
) -> dict[str, Profile]:
    """`make_profiles` of the inputs of `model`; `shapes` may name those that are cut off, too."""
    return make_profiles(model.inputs, own_shapes(model, shapes), batch=batch)


def make_profiles(
    inputs: Sequence[InputSpec],
    shapes: Mapping[str, Mapping[str, Sequence[int]]],
    *,
    batch: int = 8,
) -> dict[str, Profile]:
    """A profile for each input with free dimensions: that of `shapes`, or batches around `batch`.

    An input that `shapes` leaves out may have a free first dimension: 1 to 32 samples, or to
    `batch` if that is more, optimized for `batch`. Raises ConfigError, naming the input and the
    key, for any other free dimension, for shapes that do not fit the model, and for unknown inputs.

    >>> found = make_profiles([InputSpec("x", ("N", 3), "float32")], {}, batch=8)
    >>> found["x"].to_json()
    {'min': [1, 3], 'opt': [8, 3], 'max': [32, 3]}
    """
    names = [spec.name for spec in inputs]
    for name in shapes:
        if name not in names:
            raise ConfigError(
                f"model.shapes.{name}: the model has no such input, only "
                f"{', '.join(map(repr, names))}{did_you_mean(name, names)}"
            )
    found: dict[str, Profile] = {}
    for spec in inputs:
        given = shapes.get(spec.name)
        free = [axis for axis, dim in enumerate(spec.shape) if not isinstance(dim, int)]
        if given is not None:
            profile = Profile.from_json(given)
            _check_fits(spec, profile)
            if free:
                found[spec.name] = profile
        elif free == [0]:
            rest = tuple(dim for dim in spec.shape[1:] if isinstance(dim, int))
            largest = max(batch, LEAST_MAX)
            found[spec.name] = Profile((1, *rest), (batch, *rest), (largest, *rest))
        elif free:
            example = [dim if isinstance(dim, int) else 8 for dim in spec.shape]
            raise ConfigError(
                f"model.shapes: input {spec.name!r} has free dimensions {_shown(spec)}; say which "
                f"shapes it will get, as model.shapes.{spec.name}: "
                f"{{min: {example}, opt: {example}, max: {example}}}"
            )
    return found


def _check_fits(spec: InputSpec, profile: Profile) -> None:
    where = f"model.shapes.{spec.name}"
    for word, shape in (("min", profile.min), ("opt", profile.opt), ("max", profile.max)):
        fits = len(shape) == len(spec.shape) and all(
            not isinstance(dim, int) or dim == size
            for dim, size in zip(spec.shape, shape, strict=True)
        )
        if not fits:
            raise ConfigError(
                f"{where}.{word}: {list(shape)} does not fit the model's input {_shown(spec)}; "
                "only its free dimensions can be chosen"
            )
    for axis, (low, mid, high) in enumerate(
        zip(profile.min, profile.opt, profile.max, strict=True)
    ):
        if not 1 <= low <= mid <= high:
            raise ConfigError(
                f"{where}: axis {axis} must have 1 <= min <= opt <= max, found {low}, {mid}, {high}"
            )


def _shown(spec: InputSpec) -> str:
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in spec.shape) + "]"


def check_shapes(profiles: Mapping[str, Profile], feeds: Mapping[str, NDArray[Any]]) -> None:
    """Raise DataError for an array that lies outside the profile of its input."""
    for name, profile in profiles.items():
        shape = feeds[name].shape
        inside = len(shape) == len(profile.min) and all(
            low <= size <= high
            for low, size, high in zip(profile.min, shape, profile.max, strict=True)
        )
        if not inside:
            raise DataError(
                f"input {name!r} has shape {list(shape)}, outside the engine's profile "
                f"{list(profile.min)} to {list(profile.max)}; feed what fits, or build again with "
                f"model.shapes.{name} that includes it"
            )
