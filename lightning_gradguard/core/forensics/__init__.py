"""The operation of a batch that made the first nonfinite value, and its cause."""

from lightning_gradguard.core.forensics.classify import investigate as investigate
from lightning_gradguard.core.forensics.origin import Origin as Origin
from lightning_gradguard.core.forensics.origin import origin_in_weights as origin_in_weights
from lightning_gradguard.core.forensics.origin import out_of_range_elements as out_of_range_elements
