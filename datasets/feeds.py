"""Arrays as a user has them to feeds as the model takes them, with every mismatch named."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import DataError, did_you_mean
from trtune.datasets.batches import InputSpec, Labels, is_free
from trtune.datasets.pictures.preprocess import Preprocess, prepare_pictures

AUTO = "auto"
LABEL_NAMES = ("labels", "label", "y")


def label_array(
    found: Collection[str], inputs: Sequence[InputSpec], *, labels: str | None, where: str
) -> str | None:
    """The name of the array that holds the labels, which no input is fed with, or None.

    What `labels` names; if that is AUTO or None, the first of labels, label, y that is there and
    is no model input. Raises DataError if `labels` names what is not there.
    """
    if labels not in (None, AUTO):
        if labels not in found:
            raise DataError(
                f"{where} has no array {labels!r} for `labels`"
                f"{did_you_mean(str(labels), found)}; found {_listed(found)}"
            )
        return labels
    taken = {spec.name for spec in inputs}
    return next((name for name in LABEL_NAMES if name in found and name not in taken), None)


def match_inputs(
    found: Collection[str],
    inputs: Sequence[InputSpec],
    *,
    names: Mapping[str, str] | None,
    where: str,
) -> dict[str, str]:
    """Model input -> array, for every input: by `names`, by the same name, or the only one.

    `found` are the arrays there without the labels. Raises DataError for an input without an
    array, and for an entry of `names` that is no input or no array.
    """
    chosen = dict(names or {})
    known = [spec.name for spec in inputs]
    for name, array in chosen.items():
        if name not in known:
            raise DataError(
                f"`inputs` names {name!r}, which is no input of the model"
                f"{did_you_mean(name, known)}; its inputs are {_listed(known)}"
            )
        if array not in found:
            raise DataError(
                f"{where} has no array {array!r} for the model's input {name!r}"
                f"{did_you_mean(array, found)}; found {_listed(found)}"
            )
    for name in known:
        if name in chosen:
            continue
        if name in found:
            chosen[name] = name
        elif len(known) == 1 and len(found) == 1:
            chosen[name] = next(iter(found))
        else:
            raise DataError(
                f"{where} has nothing for the model's input {name!r}{did_you_mean(name, found)}; "
                f"found {_listed(found)}; name the array in `inputs: {{{name}: ARRAY}}`"
            )
    return chosen


def to_feeds(
    arrays: Mapping[str, NDArray[Any]],
    inputs: Sequence[InputSpec],
    *,
    preprocess: Preprocess | None,
    items: Sequence[str],
    where: str,
    check_values: bool = True,
    axes: Mapping[str, int | None] | None = None,
) -> dict[str, NDArray[Any]]:
    """Feeds by input name, cast, checked for shape, NaN and Inf.

    `arrays` maps input name to rows along `axes` (the first axis, by default); `items` names the
    rows. With `preprocess`, uint8 arrays of
    pictures for four-dimensional inputs go through it and everything else goes in as it is.
    Without `check_values` NaN and Inf pass.

    Raises DataError for a wrong shape or dtype, for a NaN or Inf (naming its item), and if
    `preprocess` is given and no array is pictures.
    """
    feeds: dict[str, NDArray[Any]] = {}
    any_pictures = False
    for spec in inputs:
        array = arrays[spec.name]
        pictures = preprocess is not None and is_pictures(array, spec)
        any_pictures = any_pictures or pictures
        if preprocess is not None and pictures:
            feeds[spec.name] = picture_feed(prepare_pictures(array, preprocess), spec, where=where)
        elif preprocess is None or len(inputs) > 1:
            hint = _dtype_hint(array)
            feed = cast(array, spec, where=where, hint=hint)
            axis = (axes or {}).get(spec.name, 0)
            check_shape(feed.shape, spec, where=where, axis=axis)
            if check_values:
                check_finite(feed, spec, items=items, where=where, axis=axis)
            feeds[spec.name] = feed
    if preprocess is not None and not any_pictures:
        shown = ", ".join(f"{a.dtype} {show_shape(a.shape)}" for a in arrays.values())
        raise DataError(
            f"`preprocess` is for uint8 pictures N x height x width x channels, and {where} has "
            f"{shown}; leave `preprocess` out (`preprocess: null`): arrays go in as they are"
        )
    return feeds


def picture_feed(pictures: NDArray[np.float32], spec: InputSpec, *, where: str) -> NDArray[Any]:
    """Preprocessed pictures, batch axis first, in the dtype of the input and of its shape.

    An integer input takes them if the preprocessing leaves whole numbers that fit (`scale: 1`).
    Raises DataError if the shape does not fit, or the values do not.
    """
    check_shape(pictures.shape, spec, where=where)
    wanted = np.dtype(spec.dtype)
    if wanted.kind not in "iu":
        return cast(pictures, spec, where=where)
    with np.errstate(invalid="ignore"):
        exact = pictures.astype(wanted)
    if not np.array_equal(exact, pictures):
        raise DataError(
            f"input {spec.name!r} takes {wanted.name}, and `preprocess` does not leave whole "
            f"numbers that fit; set `scale: 1` and leave out `mean` and `std`"
        )
    return exact


def cast(array: NDArray[Any], spec: InputSpec, *, where: str, hint: str = "") -> NDArray[Any]:
    """`array` in the dtype of the input, contiguous: floats to floats, integers that fit.

    Float to float rounds (float64 to float32); what overflows becomes Inf, which `check_finite`
    reports. Integers and booleans are cast if every value fits. The array itself is returned if
    nothing is to be done. Raises DataError for any other pair.
    """
    wanted = np.dtype(spec.dtype)
    if array.dtype.kind == "f" and wanted.kind == "f":
        with np.errstate(over="ignore"):
            return _plain(array, wanted)
    if array.dtype == wanted:
        return _plain(array, wanted)
    if array.dtype.kind in "iub" and wanted.kind in "iub":
        low, high = (0, 1) if wanted.kind == "b" else _range_of(wanted)
        if not array.size or (int(array.min()) >= low and int(array.max()) <= high):
            return _plain(array, wanted)
        hint = f"; values from {array.min()} to {array.max()} do not fit"
    raise DataError(
        f"input {spec.name!r} takes {wanted.name}, {where} has {array.dtype.name}{hint}"
    )


def check_shape(shape: Sequence[int], spec: InputSpec, *, where: str, axis: int | None = 0) -> None:
    """Raises DataError unless `shape` has the rank of the input and its fixed dimensions.

    `axis` is that of the samples, which is not looked at.
    """
    if len(shape) == len(spec.shape) and all(
        found == wanted or is_free(wanted) or number == axis
        for number, (found, wanted) in enumerate(zip(shape, spec.shape, strict=True))
    ):
        return
    raise DataError(
        f"input {spec.name!r} takes {show_shape(spec.shape)}, {where} gives "
        f"{show_shape(shape)}{_shape_hint(shape, spec)}"
    )


def check_finite(
    array: NDArray[Any],
    spec: InputSpec,
    *,
    items: Sequence[str],
    where: str,
    axis: int | None = 0,
) -> None:
    """Raises DataError naming the first item with a NaN or Inf, and the input."""
    if array.dtype.kind != "f":
        return
    # A sum is finite only if every term is, and costs one pass without a temporary.
    with np.errstate(invalid="ignore", over="ignore"):
        if np.isfinite(np.sum(array)):
            return
    rows = array[np.newaxis] if axis is None else np.moveaxis(array, axis, 0)
    bad = ~np.isfinite(rows.reshape(len(rows), -1)).all(axis=1)
    if bad.any():
        row = int(np.argmax(bad))
        values = rows[row][~np.isfinite(rows[row])]
        what = "NaN" if np.isnan(values).any() else "Inf"
        whose = "the values for all samples" if axis is None else f"item {items[row]}"
        raise DataError(
            f"{where}, {whose}: {what} in {len(values)} of {rows[row].size} values for "
            f"input {spec.name!r} ({spec.dtype}); repair or leave out that item"
        )


def to_labels(values: Any, *, where: str) -> Labels:
    """What is known of each sample: an array with a row a sample, or a tuple of an array each.

    One number a sample (N or N x 1) becomes N class indices, int64, where all are whole; masks,
    tokens, boxes and real numbers stay as they are. Raises DataError for what is not numbers.
    """
    if isinstance(values, list | tuple):
        rows = tuple(np.asarray(sample) for sample in values)
        if len({row.shape for row in rows}) != 1:
            for row in rows:
                _check_numbers(row, where)
            return rows
        values = np.stack(rows)
    array: NDArray[Any] = np.asarray(values)
    _check_numbers(array, where)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        return array
    whole = array.dtype.kind in "iub" or np.all(np.isfinite(array) & (array == np.floor(array)))
    return array.astype(np.int64) if whole else array


def _check_numbers(values: NDArray[Any], where: str) -> None:
    if values.dtype.kind not in "iubf":
        raise DataError(f"labels of {where} must be numbers, found {values.dtype.name} values")
    if not values.ndim:
        raise DataError(f"labels of {where} are a single value; one entry a sample is needed")


def show_shape(shape: Sequence[int | str | None]) -> str:
    """A shape as messages show it, the batch axis as N unless the model fixes it.

    >>> show_shape((None, 3, "height", 32))
    'N x 3 x height x 32'
    """
    shown = ("N" if size is None or (is_free(size) and isinstance(size, int)) else str(size)
             for size in shape)  # fmt: skip
    return " x ".join(shown) or "a single value"


def _plain(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Contiguous and aligned: rows mapped from an archive may begin at any byte."""
    return np.require(array, dtype, ["C", "A"])


def is_pictures(array: NDArray[Any], spec: InputSpec) -> bool:
    """Whether an array looks like uint8 pictures for an input that could take them."""
    return array.dtype == np.uint8 and array.ndim in (3, 4) and len(spec.shape) == 4


def _dtype_hint(array: NDArray[Any]) -> str:
    if array.dtype == np.uint8 and array.ndim in (3, 4):
        return "; pictures need `preprocess` (scale, mean, std, layout)"
    return "; convert the array"


def _range_of(dtype: np.dtype[Any]) -> tuple[int, int]:
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


def _shape_hint(shape: Sequence[int], spec: InputSpec) -> str:
    wanted = spec.shape[1:]
    if len(shape) == len(spec.shape) == 4:
        for layout, moved in (
            ("NHWC", (shape[2], shape[3], shape[1])),
            ("NCHW", (shape[3], shape[1], shape[2])),
        ):
            if all(f == w or is_free(w) for f, w in zip(moved, wanted, strict=True)):
                return f"; it would fit as {layout} (`preprocess.layout`)"
        return "; see `preprocess` (resize, crop, channels)"
    if len(shape) == len(spec.shape) - 1:
        return "; the first axis must be the rows, one a sample"
    return ""


def _listed(names: Collection[str]) -> str:
    return ", ".join(repr(name) for name in names) or "no arrays"
