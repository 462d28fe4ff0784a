"""A run's report: figures with captions, tables, and self-contained HTML pages.

It reads the files of a run folder and writes `report.html` and `errors.html`; it may import from `storage`, `lengths`,
`evaluation` and the rooms below them, matplotlib and Jinja. Start with `page.py`; `ablation_results.py` defines the
contents of `ablation_predicted.json` and `ablation.json`.
"""
