"""Ray and nothing else: how work is spread over a cluster, and what follows when a part of it fails.

Only this room imports Ray; it may import all rooms below, and what it spreads (a step, a model, a file of rows) lies in
these. Open `session.py` first, which starts or joins Ray, then `trainer.py` for training, `inference.py` for decoding
and `trials.py` for Ray Tune.
"""
