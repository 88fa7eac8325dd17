"""Norms of gradients, measured in few operations, also for sharded tensors."""

from lightning_gradguard.core.norms.buckets import CHUNK as CHUNK
from lightning_gradguard.core.norms.buckets import MIN_STACKED as MIN_STACKED
from lightning_gradguard.core.norms.buckets import Buckets as Buckets
from lightning_gradguard.core.norms.buckets import largest_magnitudes as largest_magnitudes
from lightning_gradguard.core.norms.buckets import norms_from_power_sums as norms_from_power_sums
from lightning_gradguard.core.norms.buckets import stack_small as stack_small
from lightning_gradguard.core.norms.gradients import Gradients as Gradients
from lightning_gradguard.core.norms.gradients import UnitNorms as UnitNorms
from lightning_gradguard.core.norms.gradients import measure_gradients as measure_gradients
from lightning_gradguard.core.norms.gradients import with_gradient as with_gradient
from lightning_gradguard.core.norms.measurement import DISAGREEMENT as DISAGREEMENT
from lightning_gradguard.core.norms.measurement import OVERFLOW as OVERFLOW
from lightning_gradguard.core.norms.measurement import Measurement as Measurement
from lightning_gradguard.core.norms.norms import power_sums as power_sums
from lightning_gradguard.core.norms.norms import tensor_norms as tensor_norms
from lightning_gradguard.core.norms.norms import total_norm_from_norms as total_norm_from_norms
from lightning_gradguard.core.norms.norms import unit_power_sums as unit_power_sums
from lightning_gradguard.core.norms.norms import unitwise_norm as unitwise_norm
from lightning_gradguard.core.norms.scaling import scale_gradients_ as scale_gradients_
from lightning_gradguard.core.norms.sharding import FlatShard as FlatShard
from lightning_gradguard.core.norms.sharding import is_sharded as is_sharded
from lightning_gradguard.core.norms.sharding import local_shard as local_shard
from lightning_gradguard.core.norms.sharding import share as share
from lightning_gradguard.core.norms.sharding import unit_places as unit_places
