"""Norms of gradients, measured in few operations, also for sharded tensors."""

from .buckets import CHUNK, MIN_STACKED, Buckets, largest_magnitudes, norms_from_power_sums, stack_small
from .gradients import (
    Gradients,
    StepContext,
    UnitNorms,
    measure_gradients,
    scale_gradients_,
    total_norm_of,
    with_gradient,
)
from .measurement import DISAGREEMENT, Measurement, OwnMeasurement, PackedMeasurement, Sent
from .norms import (
    default_norm,
    power_sums,
    project_units_,
    tensor_norms,
    total_norm_from_norms,
    unit_power_sums,
    unitwise_norm,
)
from .sharding import FlatShard, has_dtensors, local_shard, replica_factor, unit_places
