from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from trtune.configs.errors import DataError, ModelError
from trtune.datasets.batches import Batch
from trtune.reports.measures.segmentation import MeanIoU, PixelAgreement
from trtune.reports.measures.text import NextToken, Perplexity, TokenAgreement
from trtune.reports.measures.uncertainty import paired_error, standard_error

RNG = np.random.default_rng(1)


def masks(labels: Any) -> Batch:
    labels = np.asarray(labels, np.uint8)
    names = tuple(f"p{k}" for k in range(len(labels)))
    return Batch({"x": np.zeros((len(labels), 3, 4, 4))}, names, labels)


def scores(classes: Any, count: int = 3) -> np.ndarray:
    return np.eye(count)[np.asarray(classes)].transpose(0, 3, 1, 2)


def test_miou_is_that_of_all_pixels_together() -> None:
    truth = RNG.integers(0, 3, (5, 8, 8)).astype(np.uint8)
    truth[0, 0] = 255
    found = RNG.integers(0, 3, (5, 8, 8))
    measure = MeanIoU()
    measure.start()
    for rows in (slice(0, 2), slice(2, 5)):
        measure.update({"y": scores(found[rows])}, masks(truth[rows]))
    counted = truth != 255
    each = [
        ((found == k) & (truth == k) & counted).sum()
        / (((found == k) | (truth == k)) & counted).sum()
        for k in range(3)
    ]
    assert measure.result() == pytest.approx(np.mean(each))
    assert standard_error(measure) is not None
    assert paired_error(measure, measure) == 0.0


@pytest.mark.parametrize(
    "output",
    [
        pytest.param(scores([[[0, 1], [2, 1]]]), id="N x C x H x W"),
        pytest.param(np.array([[[0, 1], [2, 1]]]), id="classes"),
        pytest.param(scores([[[0, 1], [2, 1]]]).repeat(2, 2).repeat(2, 3), id="twice as large"),
    ],
)
def test_outputs_of_every_kind(output: np.ndarray) -> None:
    measure = MeanIoU()
    measure.update({"y": output}, masks([[[0, 1], [2, 1]]]))
    assert measure.result() == 1.0


def test_one_channel_is_a_foreground() -> None:
    measure = MeanIoU()
    measure.update({"y": np.array([[[[-3.0, 2.0], [4.0, -1.0]]]])}, masks([[[0, 1], [1, 0]]]))
    assert measure.result() == 1.0


def test_a_class_that_the_model_does_not_have() -> None:
    with pytest.raises(DataError, match="the mask of p0 has class 7, and the model has 3"):
        MeanIoU().update({"y": scores([[[0, 1]]])}, masks([[[0, 7]]]))


def test_an_output_that_is_no_map() -> None:
    with pytest.raises(ModelError, match="no output is a class a pixel"):
        MeanIoU().update({"y": np.zeros((1, 10))}, masks([[[0, 1]]]))


def test_pixels_that_agree() -> None:
    measure = PixelAgreement()
    reference, found = scores([[[0, 1], [2, 1]]]), scores([[[0, 1], [1, 1]]])
    measure.update_pair({"y": reference}, {"y": found}, masks([[[0, 0], [0, 0]]]))
    assert measure.result() == 0.75


def tokens(ids: Any, labels: Any = None) -> Batch:
    array = np.asarray(ids, np.int64)
    names = tuple(f"s{k}" for k in range(len(array)))
    return Batch({"ids": array}, names, None if labels is None else np.asarray(labels))


def test_perplexity_of_even_odds_is_the_number_of_tokens() -> None:
    measure = Perplexity()
    measure.update({"y": np.zeros((2, 5, 7), np.float32)}, tokens(RNG.integers(0, 7, (2, 5))))
    assert measure.result() == pytest.approx(7)


def test_perplexity_by_hand_and_labels_that_do_not_count() -> None:
    logits = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]]))
    labels = [[0, 1, -100]]
    measure = Perplexity()
    measure.update({"y": logits.astype(np.float32)}, tokens([[2, 0, 1]], labels))
    assert measure.result() == pytest.approx(math.exp(-(math.log(0.5) + math.log(0.8)) / 2))
    right = NextToken()
    right.update({"y": logits.astype(np.float32)}, tokens([[2, 0, 1]], labels))
    assert right.result() == 1.0


def test_a_mask_of_attention_leaves_padding_out() -> None:
    ids = np.array([[3, 4, 5, 0, 0]])
    batch = Batch({"ids": ids, "mask": np.array([[1, 1, 1, 0, 0]])}, ("s",))
    logits = np.zeros((1, 5, 9), np.float32)
    logits[0, 0, 4] = logits[0, 1, 5] = 50
    measure = Perplexity()
    measure.update({"y": logits}, batch)
    assert measure.result() == pytest.approx(1.0)


def test_tokens_that_agree() -> None:
    reference = np.eye(4)[[[0, 1, 2, 3]]].astype(np.float32)
    found = np.eye(4)[[[0, 1, 3, 3]]].astype(np.float32)
    measure = TokenAgreement()
    measure.update_pair({"y": reference}, {"y": found}, tokens([[0, 0, 0, 0]]))
    assert measure.result() == 0.75


def test_tokens_beyond_the_model() -> None:
    with pytest.raises(DataError, match=r"token 9 .* beyond the model's 4"):
        Perplexity().update({"y": np.zeros((1, 3, 4), np.float32)}, tokens([[0, 9, 1]]))
