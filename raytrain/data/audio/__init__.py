"""Recordings: any format of libsndfile, a span of it, mono, at the model's sample rate.

Whatever opens a recording does it here, since a recording may be anything: a pipe that never answers, a few kilobytes
that unfold to gigabytes, a header that lies. Only regular files are opened, headers are read before samples, and no
more is decoded than the span that is asked for. Files import numpy and `storage` alone, but for `samples` (the
decoders) and `embedded` (audio inside Parquet); open `reading` first.
"""

from raytrain.data.audio.errors import AudioError
from raytrain.data.audio.files import PARQUET_ROW
from raytrain.data.audio.headers import AudioHeader
from raytrain.data.audio.reading import read_audio, read_header

__all__ = ["PARQUET_ROW", "AudioError", "AudioHeader", "read_audio", "read_header"]
