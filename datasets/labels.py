"""Labels of a data set that counts classes from another number than the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from trtune.configs.files import hash_json
from trtune.datasets.batches import Batch, BatchSource, Labels


@dataclass(frozen=True, slots=True)
class Shifted:
    """`source` with `offset` added to every label; of boxes, to their class. A `BatchSource`."""

    source: BatchSource
    offset: int

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.source:
            yield replace(batch, labels=_shifted(batch.labels, self.offset))

    @property
    def count(self) -> int | None:
        """Samples a pass yields, as far as the source knows."""
        return self.source.count

    @property
    def identity(self) -> str:
        """The source's identity with the offset."""
        return hash_json([self.source.identity, self.offset])

    @property
    def skipped(self) -> tuple[str, ...]:
        """What the source skipped."""
        return self.source.skipped


def _shifted(labels: Labels | None, offset: int) -> Labels | None:
    if labels is None:
        return None
    if isinstance(labels, tuple):
        return tuple(row + np.eye(1, row.shape[1]) * offset for row in labels)
    return labels + offset
