"""Small views of the pictures that set ranges, for the report."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from trtune.datasets.pictures.thumbnails import LONGER_SIDE, thumbnails
from trtune.run.data import RunData
from trtune.run.stage import Need, Stage

MOST = 16
"""Pictures that a report shows: a few kilobytes each."""


def thumbnails_of(data: RunData, items: Sequence[str]) -> Stage[dict[str, str]]:
    """Item -> `data:` address of a JPEG, for at most `MOST` of `items`, the first ones first.

    Samples that are no pictures have none.
    """
    wanted = list(dict.fromkeys(items))[:MOST]
    preprocess = data.section.preprocess
    bgr = preprocess is not None and preprocess.channels == "BGR"

    def make(_: object) -> dict[str, str]:
        made = thumbnails(data.source, wanted, reversed_colours=bgr)
        return {item: _address(file) for item, file in made.items()}

    return Stage("thumbnails", {"data": data.need, "items": Need([*wanted, LONGER_SIDE])}, make)


def _address(file: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(file).decode("ascii")
