"""Lengths, buckets, batch sizes and schedules: pure mathematics on integers, with numpy alone."""

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
