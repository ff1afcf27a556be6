"""The error tree, and the nearest word."""

from __future__ import annotations

import pytest

from trtune.configs import errors
from trtune.configs.errors import TrtuneError, did_you_mean, nearest


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        pytest.param("TrtuneError", 1, id="anything else exits 1"),
        pytest.param("InputError", 2, id="the user's input exits 2"),
        pytest.param("ConfigError", 2, id="a wrong config exits 2"),
        pytest.param("DataError", 2, id="wrong data exits 2"),
        pytest.param("ModelError", 2, id="a wrong model exits 2"),
        pytest.param("CacheError", 2, id="a wrong cache exits 2"),
    ],
)
def test_exit_codes(kind: str, code: int) -> None:
    error = getattr(errors, kind)("what happened")
    assert isinstance(error, TrtuneError)
    assert error.exit_code == code
    assert str(error) == "what happened"


@pytest.mark.parametrize(
    ("word", "words", "count", "expected"),
    [
        pytest.param("metod", ["cache", "method"], 1, ["method"], id="the nearest word"),
        pytest.param("METHOD", ["method"], 1, ["method"], id="case does not matter"),
        pytest.param("conv2", ["Conv1", "Conv2", "Gemm"], 2, ["Conv2", "Conv1"], id="best first"),
        pytest.param("xyzzy", ["method", "cache"], 1, [], id="nothing is near"),
        pytest.param("a", [], 1, [], id="no words at all"),
        pytest.param("mes", ["max", "mse"], 1, ["mse"], id="two neighbours swapped"),
        pytest.param("n_conv", ["gemm", "n_conv12"], 1, ["n_conv12"], id="the beginning of a name"),
        pytest.param("stage1_relu", ["state9_silu"], 1, [], id="alike, but too much is other"),
        pytest.param("images", ["values"], 1, [], id="half of the letters is not near"),
        pytest.param("conv", ["Conv", "conv"], 1, ["Conv"], id="first of words alike but for case"),
    ],
)
def test_nearest(word: str, words: list[str], count: int, expected: list[str]) -> None:
    assert nearest(word, iter(words), count=count) == expected


def test_did_you_mean_names_each_candidate() -> None:
    assert (
        did_you_mean("conv2", ["conv1", "conv2x"], count=2) == "; did you mean 'conv2x' or 'conv1'?"
    )
    assert did_you_mean("xyzzy", ["conv"]) == ""
