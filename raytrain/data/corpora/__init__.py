"""Corpora of all formats: from files to chunks that workers read on their own, and from chunks to checked rows.

A module per format (`lines` for NeMo's manifests, `tarred`, `lhotse_cuts`, `lhotse_shar`, `parquet`, `audiofolder`)
gives rows with NeMo's field names, which `rows` checks and `blocks` holds by columns. Imports `data/text` (what
languages and prompt slots may be) and `data/audio` (durations), which import nothing from here; open `types`, then
`reading` first.
"""
