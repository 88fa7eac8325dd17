"""The operation of a batch that made the first nonfinite value, and its cause."""

from .classify import investigate
from .exceptions import origin_of_exception
from .inputs import or_bad_input, parts_of, parts_out_of_scale, standardizing
from .optimizer_step import origin_beyond_updates, origin_in_optimizer_step
from .origin import (
    Origin,
    OutOfRange,
    advice_on_decay,
    advice_on_schedules,
    corrupted_buffer,
    origin_in_epsilon,
    origin_in_learning_rate,
    origin_in_weights,
    out_of_range_elements,
)
from .rejections import rejection
