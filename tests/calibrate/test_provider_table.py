"""The table of onnxruntime's TensorRT provider, written and read."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trtune.calibrate.provider_table import dump_provider_table, read_provider_table

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1)
RANGES = st.floats(min_value=2.0**-100, max_value=2.0**100, width=32)


@given(st.dictionaries(NAMES, RANGES, min_size=1, max_size=8))
def test_a_table_is_read_back_to_the_same_float32(ranges: dict[str, float]) -> None:
    found = read_provider_table(dump_provider_table(ranges))
    assert found is not None
    assert {name: np.float32(amax) for name, amax in found.items()} == {
        name: np.float32(amax) for name, amax in ranges.items()
    }
