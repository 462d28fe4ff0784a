"""Copies of checkpoints on another filesystem (`train.storage_path`), from which training goes on where the run folder
is lost.

Copying never ends training: what can't be copied is said once, and the next checkpoint tries again.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

from raytrain.artifacts import make_folder
from raytrain.data.storage import locate
from raytrain.errors import CheckpointError
from raytrain.training.checkpoint import META, Checkpoint, read_checkpoint

_LOG = logging.getLogger("raytrain.checkpoints")


class CheckpointMirror:
    """Checkpoint folders below a path or URI of any filesystem that pyarrow or fsspec knows.

    A copy is whole once its `meta.json` is there, which is written last and removed first.
    """

    def __init__(self, path: str) -> None:
        self.path = path.rstrip("/")
        self._warned = False

    def put(self, source: Path) -> None:
        """Copy a checkpoint folder or a file; a failure is a warning."""
        files = [source] if source.is_file() else sorted(source.iterdir(), key=lambda file: file.name == META)
        try:
            filesystem, base = locate(self.path)
            filesystem.create_dir(base if source.is_file() else f"{base}/{source.name}", recursive=True)
            for file in files:
                name = f"{base}/{file.relative_to(source.parent).as_posix()}"
                with open(file, "rb") as data, filesystem.open_output_stream(name) as out:
                    shutil.copyfileobj(data, out, 8 << 20)
            self._warned = False
        except Exception as error:  # each filesystem has its own
            if not self._warned:
                _LOG.warning("%s can't be copied to %s (%s); the next checkpoint tries again", source, self.path, error)
            self._warned = True

    def remove(self, name: str) -> None:
        """Remove a checkpoint; one that is not there is fine."""
        try:
            filesystem, folder = locate(f"{self.path}/{name}")
            filesystem.delete_file(f"{folder}/{META}")
            filesystem.delete_dir(folder)
        except Exception as error:
            _LOG.debug("%s was not removed from %s: %s", name, self.path, error)

    def fetch_newest(self, into: Path, lineage: str) -> Checkpoint | None:
        """Bring the newest whole checkpoint of a lineage into a folder; None where there is none. Raises
        `CheckpointError` where the storage can't be read."""
        import pyarrow.fs

        try:
            filesystem, base = locate(self.path)
            found = filesystem.get_file_info(pyarrow.fs.FileSelector(base, allow_not_found=True))
            names = sorted((one.base_name for one in found if one.base_name.startswith("step_")), reverse=True)
            for name in names:
                with tempfile.TemporaryDirectory(dir=into, prefix=".fetching.") as temporary:
                    copy = make_folder(Path(temporary) / name)
                    for one in filesystem.get_file_info(pyarrow.fs.FileSelector(f"{base}/{name}")):
                        if one.is_file:
                            target = copy / one.base_name
                            with filesystem.open_input_stream(one.path) as data, open(target, "wb") as out:
                                shutil.copyfileobj(data, out, 8 << 20)
                    checkpoint = read_checkpoint(copy)
                    if checkpoint is None or checkpoint.meta.get("ids", {}).get("lineage") != lineage:
                        continue
                    copy.rename(into / name)
                return read_checkpoint(into / name)
        except OSError as error:
            raise CheckpointError(
                f"train.storage_path {self.path} can't be read",
                why=str(error).splitlines()[0],
                remedy="check the path and the credentials, or unset train.storage_path",
            ) from error
        return None
