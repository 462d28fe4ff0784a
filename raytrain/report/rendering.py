"""Self-contained pages: the templates in this folder, rendered and written atomically."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from raytrain.redaction import redacted
from raytrain.storage.artifacts import atomic_write_bytes


def write_page(out: Path, template: str, **values: Any) -> Path:
    """Render a template by name and write it, with secrets redacted, to `out`, which is returned."""
    atomic_write_bytes(out, redacted(_environment().get_template(template).render(**values)).encode())
    return out


@cache
def _environment() -> jinja2.Environment:
    # All text is escaped: transcripts and file names are untrusted.
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda value: "none" if value is None else f"{100 * value:.1f} %"
    environment.filters["seconds"] = lambda milliseconds: f"{milliseconds / 1000:.1f} s"
    environment.filters["interval"] = _interval
    environment.filters["grouped"] = lambda number: f"{number:,}".replace(",", "\u202f")
    return environment


def _interval(ends: list[float] | None, scale: float = 100) -> str:
    """`11.2 – 13.1` for [0.112, 0.131]; empty if there is no interval."""
    return f"{scale * ends[0]:.1f} – {scale * ends[1]:.1f}" if ends else ""
