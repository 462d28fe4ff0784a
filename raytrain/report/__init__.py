"""A run's report: figures with a sentence each, tables, and the HTML pages that need nothing else.

It reads the files of a run folder and writes `report.html` and `errors.html`; it may import from `storage`, `lengths`,
`evaluation` and what lies below them, matplotlib and Jinja. Open `page.py` first; `ablation_results.py` says what
`ablation_predicted.json` and `ablation.json` hold.
"""
