"""Reading the scalars of TensorBoard's event files, quickly and as far as they go."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event

from lightning_gradguard.core.run_log import Series

#: `DataType` of TensorFlow: float and double, and how they lie in `tensor_content`.
_FLOATS = {1: ("float_val", "<f"), 2: ("double_val", "<d")}


def read_scalars(
    files: Sequence[Path], is_wanted: Callable[[str], bool]
) -> tuple[dict[str, Series], list[str]]:
    """Read the scalars of a run.

    A step that is written again after later ones, as a resumed run does, replaces them: what was written
    last is what the run that went on has seen.

    Args:
        files: In the order in which they were begun.
        is_wanted: Whether the scalars of a tag are kept.

    Returns:
        Series by tag, in the order in which tags appear; and what a person should know of the reading.
    """
    steps: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    wanted: dict[str, bool] = {}
    notes: list[str] = []
    rewound: set[int] = set()
    for path in files:
        for event in _events(path, notes):
            for value in event.summary.value:
                tag = value.tag
                if tag not in wanted:
                    wanted[tag] = is_wanted(tag)
                if not wanted[tag] or (number := _number(value)) is None:
                    continue
                past = steps.setdefault(tag, [])
                numbers = values.setdefault(tag, [])
                if past and event.step <= past[-1]:
                    if event.step < past[-1]:
                        rewound.add(event.step)
                    while past and past[-1] >= event.step:
                        past.pop()
                        numbers.pop()
                past.append(event.step)
                numbers.append(number)
    if rewound:
        notes.append(
            f"steps from {min(rewound)} on were logged again, as after a resume; the last ones count"
        )
    return {tag: Series(steps[tag], values[tag]) for tag in steps}, notes


def _events(path: Path, notes: list[str]) -> Iterator[Any]:
    """The events of a file up to where it ends or is damaged.

    TensorBoard's own reader checks a checksum in Python, which takes four times as long for what a damaged
    record shows anyway: lengths that lead nowhere, or bytes that are no event.
    """
    n = 0
    try:
        with path.open("rb") as file:
            left = os.fstat(file.fileno()).st_size
            if not left:
                notes.append(f"{path.name} is empty")
            while left:
                header = file.read(12)
                size = struct.unpack_from("<Q", header)[0] if len(header) == 12 else left
                left -= 16 + size
                if left < 0:
                    notes.append(f"{path.name} is cut off or damaged after {n} records")
                    return
                record = file.read(size)
                file.seek(4, os.SEEK_CUR)
                yield Event.FromString(record)
                n += 1
    except DecodeError:
        notes.append(f"{path.name} is damaged after {n} records")
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror or error}")


def _number(value: Any) -> float | None:
    """The scalar in a summary value; `None` if it is a picture, a text or a larger tensor."""
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if not value.HasField("tensor") or value.tensor.dtype not in _FLOATS:
        return None
    field, layout = _FLOATS[value.tensor.dtype]
    numbers = getattr(value.tensor, field)
    if len(numbers) == 1:
        return float(numbers[0])
    content = value.tensor.tensor_content
    return float(struct.unpack(layout, content)[0]) if len(content) == struct.calcsize(layout) else None
