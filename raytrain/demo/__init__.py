"""`raytrain demo`: a small corpus of spoken numbers made on the spot, and the whole pipeline run over it.

`speech.py` makes the corpus with eSpeak NG, `demo.yaml` configures the run, and `run.py`, to open first, runs it and
judges the result. It may import from `stages` and what lies below.
"""
