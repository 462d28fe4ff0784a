"""Training on one rank: the step, the loop around it, checkpoints, validation, and what faults teach the next attempt.

It imports torch and numpy, knows neither Ray nor MLflow, and stands on `data`, `model`, `decoding` and `evaluation`;
`memory/` beside it predicts and probes what a step takes. Open `step.py` first, then `loop.py`.
"""
