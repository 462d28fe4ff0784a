"""The quarantine file: unreadable recordings that training replaced."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TypedDict

import orjson

from raytrain.data.assignment import Row
from raytrain.data.audio import AudioError
from raytrain.storage.artifacts import storage_error


class BrokenRecording(TypedDict):
    """A line of the file."""

    audio_path: str
    audio_start: int
    offset_ms: int
    error: str


class Quarantine:
    """Names of broken recordings, each written once as a JSON line; safe to share between threads."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._seen: set[tuple[str, int, int]] = set()
        self._news: list[BrokenRecording] = []

    def add(self, row: Row, error: AudioError) -> None:
        """Record one broken recording."""
        self.add_lines(
            [
                {
                    "audio_path": row.audio_path,
                    "audio_start": row.audio_start,
                    "offset_ms": row.offset_ms,
                    "error": str(error),
                }
            ]
        )

    def add_lines(self, lines: list[BrokenRecording]) -> None:
        """Add the entries of another quarantine."""
        with self._lock:
            for line in lines:
                key = (line["audio_path"], line["audio_start"], line["offset_ms"])
                if key in self._seen:
                    continue
                self._seen.add(key)
                if self._path is None:
                    self._news.append(line)
                    continue
                try:
                    with open(self._path, "ab") as file:
                        file.write(orjson.dumps(line) + b"\n")
                except OSError as error:
                    raise storage_error(self._path, error) from error

    def take_news(self) -> list[BrokenRecording]:
        """The entries since the last call, if there is no file."""
        with self._lock:
            news, self._news = self._news, []
        return news

    def __contains__(self, row: Row) -> bool:
        return (row.audio_path, row.audio_start, row.offset_ms) in self._seen
