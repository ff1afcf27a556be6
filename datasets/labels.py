"""Labels of a data set that counts classes from another number than the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from trtune.configs.files import hash_json
from trtune.datasets.batches import Batch, BatchSource


@dataclass(frozen=True, slots=True)
class Shifted:
    """`source` with `offset` added to every label. A `BatchSource`."""

    source: BatchSource
    offset: int

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.source:
            labels = None if batch.labels is None else batch.labels + self.offset
            yield replace(batch, labels=labels)

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
