"""Symptoms that rank 0 has found, as numbers that a collective carries to the other ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.core.detectors.diagnosis import Symptom

#: Bytes in which the symptoms of rank 0 reach the other ranks.
MESSAGE_BYTES = 2048


def encoded(symptoms: Sequence[Symptom], device: torch.device) -> Tensor:
    """Returns symptoms as a vector of fixed length, for the other ranks."""
    message: list[Any] = []
    for symptom in symptoms:
        fields = asdict(symptom)
        if len(json.dumps([*message, fields]).encode()) <= MESSAGE_BYTES:
            message.append(fields)
    raw = json.dumps(message).encode().ljust(MESSAGE_BYTES)
    return torch.tensor(list(raw), dtype=torch.float64, device=device)


def decoded(numbers: Sequence[float]) -> list[Symptom]:
    """Returns the symptoms of a vector.

    Example:
        >>> symptom = Symptom("stuck_loss", "unknown", ("head",), 1.0, "flat", "stuck", since=7)
        >>> decoded(encoded([symptom], torch.device("cpu")).tolist()) == [symptom]
        True
    """
    message = json.loads(bytes(int(round(number)) for number in numbers))
    return [Symptom.restored(fields) for fields in message]
