"""Corpora of all formats: from files to chunks that workers read on their own, and from chunks to checked rows.

One module per format (`lines` for NeMo's manifests, `tarred`, `lhotse_cuts`, `lhotse_shar`, `parquet`, `audiofolder`)
yields rows with NeMo's field names, which `rows` checks and `blocks` stores by columns. Imports `data/text` (valid
languages and prompt slots) and `data/audio` (durations), which import nothing from here; open `types`, then `reading`
first.
"""
