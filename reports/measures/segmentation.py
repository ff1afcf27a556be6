"""A class a pixel: mean intersection over union, and pixels that agree with FP32's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import DataError, ModelError
from trtune.datasets.batches import Batch, labels_of
from trtune.reports.measures.base import Array, Mean, Outputs, as_array, named_output, shapes_of

IGNORED = 255


def class_map(
    outputs: Outputs, output: str | None, size: tuple[int, int] | None = None
) -> tuple[Array, int]:
    """The class of each pixel, N x H x W, and the number of classes (0 where only classes come).

    From scores N x C x H x W (C of 2 or more), or N x H x W x C where C is smaller than both
    sides; one channel is a foreground above 0 (logits) or 0.5; whole numbers N x H x W (x 1) stay.
    `output` names the output; else the first of such a shape. `size` (height, width) brings scores
    to that many pixels by the nearest one.

    Raises ModelError if no output is a class a pixel.
    """
    for name in [output] if output else outputs:
        array = as_array(named_output(outputs, name))
        if array is not None and array.ndim in (3, 4) and array.dtype.kind in "fiub":
            found, classes = _answers(array)
            return (found if size is None else _nearest(found, size)), classes
    raise ModelError(
        f"no output is a class a pixel (N x C x H x W, or N x H x W; found: {shapes_of(outputs)}); "
        "name it in `target.output`"
    )


def _answers(array: Array) -> tuple[Array, int]:
    if array.ndim == 4 and 1 in (array.shape[1], array.shape[3]):
        array = array[:, 0] if array.shape[1] == 1 else array[..., 0]
    if array.ndim == 3:
        if array.dtype.kind != "f":
            return array, 0
        return (array > (0.5 if array.min() >= 0 and array.max() <= 1 else 0)).astype(np.int64), 2
    last = array.shape[3] < min(array.shape[1:3])
    axis = 3 if last and array.shape[1] >= array.shape[3] else 1
    return array.argmax(axis=axis), array.shape[axis]


def _nearest(maps: Array, size: tuple[int, int]) -> Array:
    if maps.shape[1:] == size:
        return maps
    rows, columns = ((np.arange(n) * m) // n for n, m in zip(size, maps.shape[1:], strict=True))
    return maps[:, rows][:, :, columns]


class MeanIoU:
    """The mean over classes of intersection over union, over all pixels of all pictures.

    Pixels labelled 255 do not count, nor do classes that are neither labelled nor found.
    """

    def __init__(self, output: str | None = None) -> None:
        self._output = output
        self._pictures: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = []

    def start(self) -> None:
        """Forget everything."""
        self._pictures = []

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Count pixels of one batch, a class a time; DataError for labels that do not fit."""
        for row, (item, label) in enumerate(
            zip(batch.items, labels_of(batch, "miou"), strict=True)
        ):
            mask = np.asarray(label)
            mask = mask.squeeze() if mask.ndim > 2 else mask
            if mask.ndim != 2 or mask.dtype.kind not in "iub":
                raise DataError(
                    f"metric 'miou' needs a mask of whole numbers, H x W, for each picture, and "
                    f"{item} has {np.shape(label)}; give a folder of PNG masks as `labels`"
                )
            maps, classes = class_map(outputs, self._output, (mask.shape[0], mask.shape[1]))
            self._pictures.append(_counts(maps[row], mask.astype(np.int64), classes, item))

    @property
    def count(self) -> int:
        """Pictures taken in."""
        return len(self._pictures)

    def result(self) -> float:
        """mIoU, 0 to 1; NaN if no pixel counts."""
        return self.weighted(np.ones(self.count))

    def weighted(self, weights: NDArray[np.float64]) -> float:
        """mIoU if each picture counted so often."""
        size = max((len(p[0]) for p in self._pictures), default=0)
        sums = np.zeros((3, size))
        for weight, counts in zip(weights, self._pictures, strict=True):
            for total, count in zip(sums, counts, strict=True):
                total[: len(count)] += weight * count
        union = sums[1] + sums[2] - sums[0]
        seen = union > 0
        return float((sums[0][seen] / union[seen]).mean()) if seen.any() else float("nan")


def _counts(
    found: Array, mask: NDArray[np.int64], classes: int, item: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pixels by class: right, found, labelled."""
    counted = mask != IGNORED
    mine, theirs = found[counted].astype(np.int64), mask[counted]
    highest = int(theirs.max(initial=0))
    if (classes and highest >= classes) or int(theirs.min(initial=0)) < 0:
        raise DataError(
            f"the mask of {item} has class {highest if highest >= classes else theirs.min()}, and "
            f"the model has {classes}, 0 to {classes - 1} (255 does not count)"
        )
    size = classes or max(highest, int(mine.max(initial=0))) + 1
    right = np.bincount(theirs[mine == theirs], minlength=size)
    return right, np.bincount(mine, minlength=size), np.bincount(theirs, minlength=size)


class PixelAgreement(Mean):
    """The share of pixels with FP32's class, a mean over pictures."""

    highest = 1.0

    def __init__(self, output: str | None = None) -> None:
        super().__init__()
        self._output = output

    def update_pair(self, reference: Outputs, outputs: Outputs, batch: Batch) -> None:
        """Take in both models' outputs."""
        theirs, _ = class_map(reference, self._output)
        mine, _ = class_map(outputs, self._output)
        self.add((theirs == mine).mean(axis=(1, 2)))
