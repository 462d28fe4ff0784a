"""Training on one rank: the step, the loop around it, checkpoints, validation, and the notes of faults for the next
attempt.

It imports torch and numpy, knows neither Ray nor MLflow, and builds on `data`, `model`, `decoding` and `evaluation`;
`memory/` predicts and measures a step's memory. Open `step.py` first, then `loop.py`.
"""
