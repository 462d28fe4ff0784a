"""Comparisons that consist of many trainings: batching schemes and decoder depths (`raytrain ablate`), and searches of
settings (`raytrain tune`).

They run stages for each candidate, hand the trainings to Ray Tune through `cluster`, and write one artifact each; they
may import from `stages`, `cluster` and what lies below, but never Ray. Open `ablate.py` first: the ablation of schemes,
by prediction and by training, with its parts in `prediction.py`, `trial_runs.py` and `outcomes.py`.
"""
