"""Runnable jobs: what `ray job submit -- python -m pipelines.<stage> --config FILE` runs."""
