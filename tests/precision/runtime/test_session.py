"""Values of chosen outputs of an onnxruntime session."""

from __future__ import annotations

import numpy as np
import pytest
import tinymodels

from trtune.precision.runtime.session import make_session, named_values


@pytest.mark.parametrize("names", [[], ["y"], ["relu", "y"]])
def test_only_what_is_named_is_given(names: list[str]) -> None:
    net = tinymodels.Net()
    x = net.op("Relu", net.input("x"), out="relu")
    proto = net.model({net.op("Neg", x, out="y"): tinymodels.PICTURE})
    session = make_session(proto, outputs=["relu"])
    rows = np.full((2, 3, 8, 8), 1.5, np.float32)
    found = named_values(session, names, {"x": rows})
    assert {name: float(value.mean()) for name, value in found.items()} == {
        name: {"relu": 1.5, "y": -1.5}[name] for name in names
    }
