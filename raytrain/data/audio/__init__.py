"""Recordings: any format of libsndfile, a span of it, mono, at the model's sample rate.

All code that opens recordings is here, since a recording may be anything: a pipe that never answers, a few kilobytes
that decompress to gigabytes, a wrong header. Only regular files are opened, headers are read before samples, and only
the requested span is decoded. Imports numpy and `storage` alone, except in `samples` (the decoders) and `embedded`
(audio inside Parquet); open `reading` first.
"""

from raytrain.data.audio.errors import AudioError
from raytrain.data.audio.files import PARQUET_ROW
from raytrain.data.audio.headers import AudioHeader
from raytrain.data.audio.reading import read_audio, read_header

__all__ = ["PARQUET_ROW", "AudioError", "AudioHeader", "read_audio", "read_header"]
