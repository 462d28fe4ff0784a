"""Lengths of utterances: histograms, bucket plans, batch sizes, mixtures and schedules, as pure functions.

Imports numpy alone and touches no device, file or process; the names exported here are its public API. Open `plan.py`
first (how buckets are cut), then `schedule.py` (which rows a step takes) and `search.py` (batch sizes).
"""

from raytrain.lengths.bucket_searches import BucketSearches
from raytrain.lengths.compare import PaddingRow, padding_by_scheme
from raytrain.lengths.grid import Bucket, BucketGrid
from raytrain.lengths.histogram import LengthHistogram
from raytrain.lengths.plan import BucketPlan, BucketSettings, make_plan
from raytrain.lengths.profile import BatchProfile, ProbeSetting
from raytrain.lengths.schedule import BatchSchedule, ScheduleState, StepPlan
from raytrain.lengths.search import BatchSizeSearch

__all__ = [
    "BatchProfile",
    "BatchSchedule",
    "BatchSizeSearch",
    "Bucket",
    "BucketGrid",
    "BucketPlan",
    "BucketSearches",
    "BucketSettings",
    "LengthHistogram",
    "PaddingRow",
    "ProbeSetting",
    "ScheduleState",
    "StepPlan",
    "make_plan",
    "padding_by_scheme",
]
