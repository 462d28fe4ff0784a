"""docs/troubleshooting.md matches the code, and the code gives a remedy for every error."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from raytrain import errors

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def generator():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        spec = importlib.util.spec_from_file_location("make_troubleshooting", ROOT / "docs/make_troubleshooting.py")
        module = sys.modules["make_troubleshooting"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return module


@pytest.fixture(scope="module")
def modules(generator):
    return generator.package(ROOT)


def made(generator, tmp_path, source):
    """The sites of a package with one module next to the error tree."""
    (tmp_path / "raytrain").mkdir()
    (tmp_path / "raytrain/errors.py").write_text((ROOT / "raytrain/errors.py").read_text())
    (tmp_path / "raytrain/module.py").write_text(source)
    return generator.error_sites(generator.package(tmp_path))


def test_the_page_is_what_the_code_says(generator, modules):
    page = generator.make_page(modules)
    assert generator.PAGE.read_text() == page, "run python docs/make_troubleshooting.py"
    assert "docs/troubleshooting.md" in (ROOT / "README.md").read_text()


def test_every_error_says_what_to_do(generator, modules):
    assert not [(site.module, site.what) for site in generator.error_sites(modules) if not site.remedy]


def test_every_class_of_the_tree_has_a_section(generator, modules):
    classes, page = generator.error_classes(modules), generator.make_page(modules)
    tree = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert tree < set(classes) and all(classes.values())
    assert all(f"\n### {name}\n" in page for name in classes)


def test_every_reason_of_a_row_and_every_warning_is_explained(generator, modules):
    assert set(generator.bad_row_reasons(modules)) == set(generator.REASONS)
    assert set(generator.warnings(modules)) == set(generator.WARNINGS)
    assert all(generator.WARNINGS.values()) and all(map(all, generator.REASONS.values()))


def test_a_message_is_shown_as_it_is_read(generator, tmp_path):
    source = """
from raytrain.errors import DataError
LIMIT = 3
_KINDS = {"a": 1, "b": 2}
class OwnError(DataError):
    "Of this module."
def guard(action):
    def call(path, self, error):
        why = str(error)
        raise OwnError(
            f"can't {action} {path} of {self._name}, {len(path)} of {LIMIT:.1f}",
            why=why, allowed=", ".join(_KINDS), remedy="fix " + f"{path}",
        )
    return call
guard("read"), guard("list")
def again(parts):
    return DataError(**parts)
"""
    sites = made(generator, tmp_path, source)
    shown = [f"can't {action} ‹path› of ‹name›, … of 3.0" for action in ("read", "list")]
    assert [site.what for site in sites] == shown
    assert {(site.error, site.why, site.allowed, site.remedy) for site in sites} == {
        ("OwnError", "what the system says", "a, b", "fix ‹path›")
    }


@pytest.mark.parametrize("text", ["a|b <c> *d* _e_ [f]", "no `odd tick", "`code_with|signs` and snake_case"])
def test_markdown_shows_a_text_as_it_is(generator, text):
    shown = generator.prose(text)
    if shown.startswith("``"):
        shown = shown[3:-3]
    assert re.sub(r"\\(\W|_)", r"\1", shown).replace("&lt;", "<") == text
    assert "snake\\_case" not in shown
