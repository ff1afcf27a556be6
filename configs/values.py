"""The kinds of values that keys may hold, and how a wrong one is reported."""

from __future__ import annotations

import re
from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

BYTE_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
GREY = (114,)
"""The frame of a letterbox where nothing else is said, as Ultralytics and YOLOX have it."""
HELD_OUT = 24
"""Calibration pictures that ranges are judged on."""
PERCENTILE = 99.99
"""Of the magnitudes that method percentile keeps."""
BUILD_SECONDS = 1800.0
"""After which a build by TensorRT-RTX is ended."""
FUNCTION = r".+:[A-Za-z_]\w*"


def key_error(key: str, message: str) -> PydanticCustomError:
    """An error about `key` (dotted, below the value being validated); '' is the value itself."""
    return PydanticCustomError("at_key", "{message}", {"key": key, "message": message})


def expected(what: str) -> PydanticCustomError:
    """An error whose message becomes 'expected WHAT, found VALUE'."""
    return PydanticCustomError("expected", "{what}", {"what": what})


def parse_bytes(value: object) -> int:
    """A number of bytes from an integer or from text such as '4GiB', '512MiB', '1.5GiB'.

    >>> parse_bytes("2KiB")
    2048

    Raises an error that pydantic collects (a ValueError) for anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w*)", value.strip())):
        units = {unit.casefold(): size for unit, size in BYTE_UNITS.items()} | {"": 1}
        unit = match[2].casefold()
        if unit in units and (size := int(float(match[1]) * units[unit])) > 0:
            return size
    raise expected("a size such as 4GiB, 512MiB or a number of bytes")


def format_bytes(value: int) -> int | str:
    """`value` in the largest unit that holds it exactly; bytes stay a plain number.

    >>> format_bytes(4 << 30), format_bytes(1000)
    ('4GiB', 1000)
    """
    for unit, size in reversed(BYTE_UNITS.items()):
        if size > 1 and value % size == 0:
            return f"{value // size}{unit}"
    return value


def _parse_size(value: object) -> int | tuple[int, int]:
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    sides: list[Any] = list(value) if pair else [value]  # type: ignore[call-overload]
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise expected("a number of pixels or [height, width]")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _size_as_written(value: int | tuple[int, int]) -> int | list[int]:
    return value if isinstance(value, int) else list(value)


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise expected("a number")
    return value


def _channel_values(value: object) -> object:
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _capability(value: object) -> str:
    text = str(value) if isinstance(value, (str, float)) else ""
    if not re.fullmatch(r"\d{1,2}\.\d", text):
        raise expected('a compute capability in quotes such as "8.9"')
    return text


Bytes = Annotated[
    int,
    PlainValidator(parse_bytes),
    PlainSerializer(format_bytes, return_type=int | str),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": r"^\d+(\.\d+)? ?([KkMmGgTt][Ii])?[Bb]?$"},
            ]
        }
    ),
]
Size = Annotated[
    int | tuple[int, int],
    PlainValidator(_parse_size),
    PlainSerializer(_size_as_written),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {
                    "type": "array",
                    "items": {"type": "integer", "minimum": 1},
                    "minItems": 2,
                    "maxItems": 2,
                },
            ]
        }
    ),
]
Count = Annotated[int, BeforeValidator(_number), Field(ge=1)]
Natural = Annotated[int, BeforeValidator(_number), Field(ge=0)]
Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
ChannelValues = Annotated[
    tuple[Real, ...],
    BeforeValidator(_channel_values),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "array", "items": {"type": "number"}}]}),
]
ComputeCapability = Annotated[
    str, PlainValidator(_capability), WithJsonSchema({"type": ["string", "number"]})
]


class Section(BaseModel):
    """A part of the config: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _empty_is_not_given(cls, value: Any) -> Any:
        """A key with nothing behind it, as when all below it is commented out, has its default."""
        if not isinstance(value, dict):
            return value
        fields = cls.model_fields
        return {
            key: item
            for key, item in value.items()
            if item is not None or key not in fields or _allows_none(fields[key].annotation)
        }


def _allows_none(annotation: Any) -> bool:
    return type(None) in get_args(annotation)
