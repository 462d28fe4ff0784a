"""docs/rooms.svg shows the imports as they are."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_picture_of_rooms_is_current(tmp_path):
    spec = importlib.util.spec_from_file_location("make_rooms", ROOT / "docs" / "make_rooms.py")
    make_rooms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_rooms)
    make_rooms.draw(tmp_path / "rooms.svg")
    assert (tmp_path / "rooms.svg").read_text() == make_rooms.PICTURE.read_text(), "run python docs/make_rooms.py"
