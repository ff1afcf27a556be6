"""Along which axis the samples lie in the arrays that a user gives for a model's inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from trtune.configs.errors import DataError
from trtune.datasets.batches import InputSpec, batch_axes, batch_symbol, is_free


def feed_axes(
    arrays: Mapping[str, NDArray[Any]],
    inputs: Sequence[InputSpec],
    *,
    given: Mapping[str, int] | None = None,
    pictures: Collection[str] = (),
) -> dict[str, int | None]:
    """By input, the axis of its array that the samples lie along; None: it is one for all samples.

    `arrays` maps input name to array, `given` says the axis for some, `pictures` go through
    preprocessing and have the samples first. An array of exactly the input's shape is one for all
    samples, unless every array is (then they hold one batch). Else the axis with the batch's name,
    or the only one in which the array differs from the input's shape. Behind a fixed first axis
    (a recurrent state, layers x batch x hidden) a free one without a name of the batch counts
    samples if it alone is as long as those of the other arrays.
    """
    given = given or {}
    axes = batch_axes(inputs, given)
    settled = {name for name in axes if name in given or name in pictures}
    axes |= dict.fromkeys(pictures, 0)
    exact = {s.name for s in inputs if s.name not in settled and _is_exact(arrays[s.name], s)}
    rows = [s for s in inputs if s.name not in exact and arrays[s.name].ndim]
    for spec in inputs:
        array = arrays[spec.name]
        if spec.name in settled:
            continue
        if spec.name in exact:
            axes[spec.name] = None if rows else axes[spec.name]
        elif not any(map(is_free, spec.shape)):
            axes[spec.name] = _odd_axis(array.shape, spec, axes[spec.name])
    axes = _with_states(arrays, rows, axes)
    axes = _with_lengths(arrays, inputs, axes, settled)
    _refuse_mixed(arrays, inputs, axes)
    return axes


def _refuse_mixed(
    arrays: Mapping[str, NDArray[Any]],
    inputs: Sequence[InputSpec],
    axes: Mapping[str, int | None],
) -> None:
    """Raise DataError for samples of an input whose batch the model fixes beside a free one."""
    placed = ((s, axes[s.name]) for s in inputs)
    along = {s.name: s.shape[k] for s, k in placed if k is not None and k < len(s.shape)}
    fixed = [name for name, dim in along.items() if not is_free(dim)]
    if not fixed or len(fixed) == len(along):
        return
    name = fixed[0]
    shape = next(list(spec.shape) for spec in inputs if spec.name == name)
    raise DataError(
        f"input {name!r} takes exactly {shape}, and its array is {list(arrays[name].shape)}, while "
        "other inputs have a free batch: give one array of that shape, which is then the same for "
        "all samples, or export the model with a free batch there too"
    )


def _is_exact(array: NDArray[Any], spec: InputSpec) -> bool:
    return array.shape == tuple(spec.shape)


def _odd_axis(shape: Sequence[int], spec: InputSpec, found: int | None) -> int | None:
    if len(shape) != len(spec.shape):
        return found
    odd = [k for k, (a, b) in enumerate(zip(shape, spec.shape, strict=True)) if a != b]
    return odd[0] if len(odd) == 1 else found


def _with_states(
    arrays: Mapping[str, NDArray[Any]],
    inputs: Sequence[InputSpec],
    axes: dict[str, int | None],
) -> dict[str, int | None]:
    counts = {
        arrays[name].shape[axis]
        for name, axis in axes.items()
        if axis is not None and axis < arrays[name].ndim
    }
    found = dict(axes)
    for spec in inputs:
        shape = arrays[spec.name].shape
        if axes[spec.name] is None and len(shape) == len(spec.shape) and len(counts) == 1:
            places = [k for k, dim in enumerate(spec.shape) if is_free(dim) and shape[k] in counts]
            found[spec.name] = places[0] if len(places) == 1 else None
    return found


def _with_lengths(
    arrays: Mapping[str, NDArray[Any]],
    inputs: Sequence[InputSpec],
    axes: dict[str, int | None],
    settled: Collection[str],
) -> dict[str, int | None]:
    """Free first axes of another name than the batch's: one for all, where lengths say so."""
    symbol = batch_symbol(inputs)
    if not symbol:
        return axes
    counted = {
        arrays[spec.name].shape[axis]
        for spec in inputs
        if (axis := axes[spec.name]) is not None
        and axis < arrays[spec.name].ndim
        and (spec.name in settled or spec.shape[axis] == symbol)
    }
    for spec in inputs:
        axis, array = axes[spec.name], arrays[spec.name]
        if spec.name in settled or axis is None or spec.shape[axis] == symbol:
            continue
        if array.ndim and len(counted) == 1 and array.shape[0] not in counted:
            axes[spec.name] = None
    return axes


def sample_count(
    arrays: Mapping[str, NDArray[Any]],
    axes: Mapping[str, int | None],
    *,
    where: str,
    names: Mapping[str, str] | None = None,
) -> int:
    """The number of samples that all `arrays` share along their `axes` (the first by default).

    `names` are what messages call them. Raises DataError naming those that differ, or if no array
    has a row a sample.
    """
    lengths: dict[str, int] = {}
    for name, array in arrays.items():
        shown, axis = (names or {}).get(name, name), axes.get(name, 0)
        if axis is None:
            continue
        if axis >= array.ndim:
            what = "is a single value; rows are needed" if not array.ndim else f"has no axis {axis}"
            raise DataError(f"array {shown!r} of {where} {what}")
        lengths[shown] = array.shape[axis]
    if not lengths:
        raise DataError(
            f"no array of {where} holds a row a sample: each has exactly its input's shape; give "
            "one more axis to what changes from sample to sample, or name it in `axis`"
        )
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name!r} {length}" for name, length in lengths.items())
        raise DataError(
            f"the arrays of {where} differ in their number of rows: {shown}; an array of exactly "
            "its input's shape is the same for all samples, and `axis: {INPUT: N}` says which "
            "axis counts them"
        )
    return next(iter(lengths.values()))
