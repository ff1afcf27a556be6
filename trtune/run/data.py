"""The data of a run: the sections of the config opened, and checked against model and target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trtune.configs.errors import DataError
from trtune.configs.schema import Config
from trtune.configs.sources import DataSet
from trtune.datasets.batches import (
    Batch,
    BatchSource,
    InputSpec,
    batch_size,
    first_batch,
    require_labels,
    take_rows,
)
from trtune.datasets.open import open_section
from trtune.precision.backends.gpu.profiles import Profile, make_profiles, own_shapes
from trtune.precision.graph.file import Model
from trtune.run.stage import Need, Stage, flat, versions

WITHOUT_PICTURES = ("arrays", "idx", "npy", "python")
"""Sources that hold numbers, and no pictures to be decoded."""


@dataclass(frozen=True, slots=True)
class RunData:
    """A `data` section and the batches that it describes; `where` is its key path."""

    where: str
    section: DataSet
    source: BatchSource

    @property
    def need(self) -> Need:
        """What is in the batches, for keys: pictures depend on the Pillow that decoded them too."""
        decoded = self.section.source not in WITHOUT_PICTURES or self.section.preprocess is not None
        told = self.section.model_dump(mode="json", exclude={"batch", "on_error"})
        return Need([self.source, versions("pillow") if decoded else {}], flat(told, self.where))


def data_of(config: Config, model: Model) -> dict[str, RunData]:
    """The data of every section by its name, looked into: see `check_data`."""
    found = {
        name: RunData(f"data.{name}", section, open_section(section, model.inputs))
        for name, section in config.data.sections.items()
    }
    fixed = fixed_batch(model)
    check_data(config, {name: data.source for name, data in found.items()}, fixed_batch=fixed)
    shapes = {name: shape.model_dump() for name, shape in config.model.shapes.items()}
    for data in found.values():
        check_shapes_of(data, model.inputs, own_shapes(model, shapes), fixed=fixed)
    return found


def left_out(data: RunData) -> Stage[list[str]]:
    """The samples of `data` that cannot be read, where the config says to leave them out."""

    def make(folder: Path) -> list[str]:
        if data.section.on_error == "skip" and data.source.count is None:
            for _ in data.source:  # only a whole pass can tell
                pass
        return sorted(data.source.skipped)

    return Stage(f"left-out-{data.where}", {data.where: data.need}, make)


def fixed_batch(model: Model) -> int | None:
    """The batch size that the model fixes, if it does."""
    return batch_size(model.inputs, 0) or None


def check_shapes_of(
    data: RunData,
    inputs: Sequence[InputSpec],
    shapes: Mapping[str, Mapping[str, Sequence[int]]],
    *,
    fixed: int | None = None,
) -> None:
    """Raise DataError for a batch of `data` that lies outside `model.shapes`.

    Where every sample has the same shape the first batch tells, and the last if it is short; else
    all are read. Raises ConfigError for shapes that do not fit the model.
    """
    profiles = make_profiles(inputs, shapes) if shapes else {}
    if not profiles:
        return
    first: Batch | None = None
    for batch in data.source:
        first = first or batch
        for name, profile in profiles.items():
            shape = batch.feeds[name].shape
            _check_shape(data.where, name, shape, profile, repr(batch.items[0]))
        if _one_shape(data.section):
            break
    count, size = data.source.count, data.section.batch
    if first is None or fixed is not None or count is None or not 0 < count % size < count:
        return
    last = take_rows(first, [0] * (count % size))
    for name, profile in profiles.items():
        shape = last.feeds[name].shape
        _check_shape(data.where, name, shape, profile, f"what is left of {count} samples")


def _one_shape(section: DataSet) -> bool:
    preprocess = section.preprocess
    sized = preprocess is not None and (
        preprocess.crop is not None
        or isinstance(preprocess.resize, tuple)
        or (preprocess.letterbox is not None and preprocess.letterbox.stride is None)
    )
    return section.source in ("arrays", "idx") or sized


def _check_shape(where: str, name: str, shape: Sequence[int], profile: Profile, item: str) -> None:
    inside = len(shape) == len(profile.min) and all(
        low <= size <= high for low, size, high in zip(profile.min, shape, profile.max, strict=True)
    )
    if not inside:
        raise DataError(
            f"{where}: {item} gives input {name!r} the shape {list(shape)}, outside of "
            f"model.shapes.{name}: min {list(profile.min)}, max {list(profile.max)}; change these, "
            f"or what is fed ({where}.batch, preprocess)"
        )


def check_data(
    config: Config, sources: Mapping[str, BatchSource], *, fixed_batch: int | None = None
) -> None:
    """Read the first batch of every section's source, so that what is wrong shows before long work.

    `fixed_batch` is how many samples the model takes at a time, if it fixes that. Raises DataError
    for empty data, arrays that do not fit the model, too few to fill one batch of calibration, or
    labels that the target needs and that are not there.
    """
    first = first_batch(sources["calibration"], "data.calibration")
    if fixed_batch and len(first) < fixed_batch:
        raise DataError(
            f"data.calibration: the model takes {fixed_batch} samples at a time, and there are "
            f"only {len(first)}; give more, or export the model with a free batch dimension"
        )
    others = {name: source for name, source in sources.items() if name != "calibration"}
    sections, target = config.data.sections, config.precision.target
    for name, source in others.items():
        if sections[name] != sections["calibration"]:
            first_batch(source, f"data.{name}")
        if target is not None and target.needs_labels:
            require_labels(source, target.metric)
