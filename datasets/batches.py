"""What flows from data to model: batches, and the protocol that whoever makes them follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One model input: name, shape (a str or None is a free dimension), numpy dtype name."""

    name: str
    shape: tuple[int | str | None, ...]
    dtype: str

    @property
    def fixed_batch(self) -> int | None:
        """The size of the first dimension if the model fixes it."""
        first = self.shape[0] if self.shape else None
        return first if isinstance(first, int) else None


@dataclass(frozen=True, slots=True)
class Batch:
    """Some samples: `feeds` maps input name to an array with the batch axis first.

    `items` names each sample for messages and reports (a file name, or the row number);
    `labels` are class indices, one a sample, or None.
    """

    feeds: Mapping[str, NDArray[Any]]
    items: tuple[str, ...]
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.items)


class BatchSource(Protocol):
    """Batches that can be read any number of times, each time the same."""

    def __iter__(self) -> Iterator[Batch]: ...

    @property
    def count(self) -> int | None:
        """Number of samples a pass yields, or None if only a pass can tell."""

    @property
    def identity(self) -> str:
        """Hash of everything that decides the content of the batches, but not their size."""

    @property
    def skipped(self) -> tuple[str, ...]:
        """Items left out because they could not be read (`on_error: skip`)."""
