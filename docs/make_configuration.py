"""Generate docs/configuration.md from the settings' own descriptions: `python docs/make_configuration.py`.

With `--check` nothing is written, and the exit code is 1 if the page is stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from raytrain.config.reference import Entry, by_section, entries

PAGE = Path(__file__).parent / "configuration.md"
INTRODUCTION = """# Configuration

Made by `python docs/make_configuration.py` from the code: change the texts there. `raytrain config` prints the same,
`raytrain config train` a section and `raytrain config train.max_steps` a key; with `--config FILE` it shows a
configuration's values beside the defaults.

A configuration is a YAML file with these sections; only `name` and `data.train` are required. `--set SECTION.KEY=VALUE`
overrides a value. Sizes in bytes may have a unit (`16GiB`, `512MB`). Unknown keys and values that are not allowed are
errors, all reported at once.

Settings marked ● belong to the *lineage*: they decide what a model learns, so that training can't be resumed from a
checkpoint of another value. A run whose lineage changes trains anew, and keeps the earlier checkpoints in `previous/`.
All others may change while a run is stopped.
"""
COLUMNS = "| | setting | default | allowed | meaning |\n|---|---|---|---|---|"
ENTRIES = {
    "": ("Top level", ""),
    "data.train.*": ("data.train, data.dev, data.test", "Keys of an entry; `path` alone may stand for an entry."),
    "tune.space.*": ("tune.space", "Keys of a setting to draw, of which it has one."),
}


def make_page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *_sections()])


def _sections() -> Iterator[str]:
    sentences = {entry.key: entry.help for entry in entries()}
    for section, members in by_section(entries()).items():
        title, sentence = ENTRIES.get(section) or (section, sentences[section])
        yield f"## {title}\n"
        if sentence:
            yield f"{_prose(sentence)}\n"
        yield COLUMNS
        yield from map(_row, members)
        yield ""


def _row(entry: Entry) -> str:
    default = "required" if entry.is_required else "" if entry.default is None else f"`{entry.shown_default}`"
    mark = "●" if entry.lineage else ""
    return f"| {mark} | `{entry.name}` | {default} | {_prose(entry.limits)} | {_prose(entry.help)} |"


def _prose(text: str) -> str:
    """Escape text for Markdown: help texts contain no markup."""
    for character in "\\*_|<[":
        text = text.replace(character, f"\\{character}")
    return text


def main() -> int:
    """Write the page, or with `--check` report whether it is current."""
    page = make_page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page)
        return 0
    if PAGE.exists() and PAGE.read_text() == page:
        return 0
    print("docs/configuration.md is stale: python docs/make_configuration.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
