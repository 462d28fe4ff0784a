"""`raytrain demo`: generate a small corpus of spoken numbers and run the whole pipeline on it.

`speech.py` generates the corpus with eSpeak NG, `demo.yaml` configures the run, and `run.py`, the place to start, runs
it and checks the result. It may import from `stages` and the rooms below.
"""
