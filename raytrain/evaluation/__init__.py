"""Quality of decoded texts: error rates and BLEU with confidence intervals, and the worst utterances of a test.

May import numpy and the rooms up to `decoding`; jiwer, sacrebleu and whisper_normalizer are imported only when a score
needs them. Open `scoring.py` first: it makes the content of `scores.json`; `validation_scores.py` is its lightweight
counterpart for training.
"""
