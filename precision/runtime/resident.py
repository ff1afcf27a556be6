"""Activations that stay where the network runs, for many short runs on the same ones."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from trtune.calibrate.gpu.memory import device_memory
from trtune.calibrate.sessions import cuda_number

RESIDENT_SHARE = 4
"""Of a GPU's memory that held activations may take; what is beyond is copied for each run."""


class Resident:
    """The arrays of `stored`, a mapping a batch, as values on `device`, each copied once.

    Thread-safe. Arrays are copied to the device when they are first read.
    """

    def __init__(self, stored: Sequence[Mapping[str, NDArray[Any]]], device: str) -> None:
        self._stored, self._number = stored, cuda_number(device)
        self._values: dict[tuple[int, str], ort.OrtValue] = {}
        self._left: int | None = None
        self._lock = threading.Lock()

    def run(
        self,
        session: ort.InferenceSession,
        names: Sequence[str],
        batch: int,
        held: Sequence[str],
        more: Mapping[str, np.float32],
    ) -> dict[str, NDArray[Any]]:
        """The outputs `names` of `session` on the `held` tensors of a batch and `more` scalars."""
        feeds = {tensor: self._value(batch, tensor) for tensor in held}
        feeds |= {n: ort.OrtValue.ortvalue_from_numpy(np.asarray(v)) for n, v in more.items()}
        found = session.run_with_ort_values(list(names), feeds)
        return {name: value.numpy() for name, value in zip(names, found, strict=True)}

    def _value(self, batch: int, tensor: str) -> ort.OrtValue:
        array = np.ascontiguousarray(self._stored[batch][tensor])
        if self._number is None:
            return ort.OrtValue.ortvalue_from_numpy(array)
        with self._lock:
            key = (batch, tensor)
            if key not in self._values:
                if self._left is None:
                    self._left = device_memory(self._number) // RESIDENT_SHARE
                if array.nbytes > self._left:
                    return ort.OrtValue.ortvalue_from_numpy(array)
                self._left -= array.nbytes
                self._values[key] = ort.OrtValue.ortvalue_from_numpy(array, "cuda", self._number)
            return self._values[key]
