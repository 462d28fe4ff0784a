"""Everything that touches Ray: distributing work over a cluster and recovering when part of it fails.

Only this room imports Ray. It may import all rooms below it, and the work it distributes (a training step, a model, a
file of rows) is defined there. Start with `session.py`, which starts or joins Ray, then read `trainer.py` for training,
`inference.py` for decoding, `trials.py` and `tuning.py` for Ray Tune. Two files serve Ray without importing it:
`supervisor.py` ends a local Ray with its driver, and `gpu_driver.py` counts a node's GPUs.
"""
