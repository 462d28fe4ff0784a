"""Ray's sockets have names that are short enough for any TMPDIR."""

import os
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain.cluster import sockets
from raytrain.errors import ClusterError

SUFFIX = "/session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store"


def test_the_limit_is_that_of_a_unix_socket():
    assert sockets.LONGEST + len(SUFFIX) == 107


@given(length=st.integers(1, 200))
def test_names_fit(length):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", "/tmp/" + "x" * length)
        patch.delenv("RAY_TMPDIR", raising=False)
        folder = sockets.socket_folder()
    assert len(folder + SUFFIX) <= 107


def test_a_folder_of_somebody_else_is_not_taken(tmp_path):
    mine = tmp_path / "mine"
    assert sockets._is_mine(mine) and mine.stat().st_mode & 0o777 == 0o700
    mine.chmod(0o770)
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").touch()
    for name in ("mine", "link", "file", "gone/deeper"):
        assert not sockets._is_mine(tmp_path / name)


def test_no_folder_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "x" * 60)
    monkeypatch.setattr(sockets, "_is_mine", lambda folder: False)
    with pytest.raises(ClusterError, match="no usable folder for Ray's sockets.*set TMPDIR"):
        sockets.socket_folder()


@pytest.mark.parametrize("folder", ["ünï", "file"])
def test_a_folder_that_ray_can_not_use_is_replaced(folder, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sockets, "LONGEST", 200)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / folder))
    chosen = sockets.socket_folder()
    assert chosen in sockets.short_folders() and "for Ray's sockets: they are in" in caplog.text


def test_a_tmpdir_that_is_not_there_is_not_made(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    assert sockets.socket_folder() == os.path.join(tempfile.gettempdir(), "ray")
    assert not (tmp_path / "gone").exists()
