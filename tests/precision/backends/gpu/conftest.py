from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from cudadouble import CudaDouble
from gpuparts import RUNTIME, needs_gpu

from trtune.precision.backends.gpu import driver as cuda


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> CudaDouble:
    made = CudaDouble()
    monkeypatch.setitem(sys.modules, RUNTIME, made)
    return made


@pytest.fixture(params=["double", pytest.param("gpu", marks=[needs_gpu, pytest.mark.gpu])])
def runtime(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The double, then a real GPU: what holds for the one must hold for the other."""
    if request.param == "gpu":
        yield cuda.load_runtime()
        return
    made: CudaDouble = request.getfixturevalue("double")
    yield made
    assert made.held == {}, "not freed by the test"
