"""Everything that touches Ray: distributing work over a cluster and recovering when part of it fails.

Only this room imports Ray. It may import all rooms below it, and the work it distributes (a training step, a model, a
file of rows) is defined there. Start with `session.py`, which starts or joins Ray, then read `trainer.py` for training,
`inference.py` for decoding and `trials.py` for Ray Tune.
"""
