"""Comparisons that consist of many training runs: batching schemes and decoder depths (`raytrain ablate`), and searches
over settings (`raytrain tune`).

They run stages for each candidate, submit the training runs to Ray Tune through `cluster`, and write one artifact each;
they may import from `stages`, `cluster` and the rooms below, but never Ray. Start with `ablate.py`: the ablation of
schemes, by prediction and by training, with its parts in `prediction.py`, `trial_runs.py` and `outcomes.py`.
"""
