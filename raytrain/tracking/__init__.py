"""Experiment tracking behind a protocol; MLflow is one file of it."""

from raytrain.tracking.base import (
    JsonLinesTracker,
    MultiTracker,
    NullTracker,
    Tracker,
    metrics_of,
    read_metrics,
)

__all__ = ["JsonLinesTracker", "MultiTracker", "NullTracker", "Tracker", "metrics_of", "read_metrics"]
