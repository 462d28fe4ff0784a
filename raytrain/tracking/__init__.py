"""Experiment tracking behind a protocol; MLflow is one file of it."""

from raytrain.tracking.base import JsonLinesTracker, MultiTracker, NullTracker, Tracker

__all__ = ["JsonLinesTracker", "MultiTracker", "NullTracker", "Tracker"]
