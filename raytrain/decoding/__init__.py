"""From audio to text with a trained model: search, long recordings, and models packed for inference.

May import torch, numpy and the rooms up to `model`; it knows nothing about Ray, run folders or scores. Open `search.py`
first (what to decode and how), then follow the data: `steps.py` (a token for each row), `greedy.py` or `beam.py` with
`hypothesis.py` (their result), `graphs.py` (the same steps as CUDA graphs). Around them are `requests.py` and
`batching.py` (rows of manifests as batches), `precision.py` and `recognizer.py` (a model on a device), `alignment.py`
and `longform.py` (times of tokens, windows joined), and `transcriber.py`, which puts it all together.
"""
