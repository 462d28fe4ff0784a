"""NeMo JSONL manifests."""

from __future__ import annotations

from raytrain.data.corpora.lines import first_line, line_chunks, read_lines

make_chunks = line_chunks
read = read_lines
__all__ = ["first_line", "make_chunks", "read"]
