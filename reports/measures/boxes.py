"""Boxes: overlap, suppression of doubles, and what a detector's picture amounts to.

Boxes are left, top, right, bottom in pixels of the model's input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtune.reports.measures.base import Array

_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Detections:
    """What was found in one picture, the surest first: boxes K x 4, scores K, classes K."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]

    def above(self, score: float) -> Detections:
        """Those surer than `score`."""
        keep = self.scores > score
        return Detections(self.boxes[keep], self.scores[keep], self.classes[keep])


def overlaps(left: Array, right: Array, *, crowd: Array | None = None) -> NDArray[np.float64]:
    """Intersection over union of every box of `left` (M x 4) with every one of `right` (N x 4).

    M x N. Where `crowd` (N) is true, over the area of the left box alone, as COCO has it.

    >>> overlaps(np.array([[0, 0, 2, 2]]), np.array([[1, 0, 3, 2], [5, 5, 6, 6]])).round(3)
    array([[0.333, 0.   ]])
    """
    a, b = np.asarray(left, np.float64), np.asarray(right, np.float64)
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inner = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = [np.prod(np.clip(x[:, 2:] - x[:, :2], 0, None), axis=1) for x in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - inner
    if crowd is not None:
        union = np.where(crowd[None, :], areas[0][:, None], union)
    found: NDArray[np.float64] = np.divide(inner, union, out=np.zeros_like(inner), where=union > 0)
    return found


def suppress(boxes: Array, scores: Array, classes: Array, iou: float) -> NDArray[np.intp]:
    """Rows that greedy non-maximum suppression keeps, the surest first.

    A box goes if a surer one that stays, of the same class, overlaps it by more than `iou`. Equal
    scores keep the order of the rows. Works by blocks of rows: within a block, one after the
    other; against all later ones, at once.
    """
    order = np.argsort(-scores, kind="stable")
    if not len(order):
        return order
    # Boxes of other classes are moved apart, so that one pass serves all.
    boxes = np.asarray(boxes, np.float64)
    span = float(boxes.max() - boxes.min()) + 1.0
    moved = boxes[order] + (classes[order].astype(np.float64) * span)[:, None]
    alive = np.ones(len(order), bool)
    for start in range(0, len(order), _BLOCK):
        rows = np.flatnonzero(alive[start : start + _BLOCK]) + start
        inner = overlaps(moved[rows], moved[rows]) > iou
        for place in range(len(rows)):
            if alive[rows[place]]:
                alive[rows[place + 1 :][inner[place, place + 1 :]]] = False
        rows = rows[alive[rows]]
        later = np.flatnonzero(alive[start + _BLOCK :]) + start + _BLOCK
        if len(rows) and len(later):
            alive[later[(overlaps(moved[rows], moved[later]) > iou).any(axis=0)]] = False
    kept: NDArray[np.intp] = order[alive]
    return kept


def from_centres(boxes: Array) -> Array:
    """Boxes (... x 4) of centre x, centre y, width, height as left, top, right, bottom."""
    half = boxes[..., 2:] / 2
    return np.concatenate([boxes[..., :2] - half, boxes[..., :2] + half], axis=-1)
