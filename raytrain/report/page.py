"""placeholder"""
from pathlib import Path


def write_report(run_dir: Path, out: Path, *, title: str) -> Path:
    out.write_text(title)
    return out
