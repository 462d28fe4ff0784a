"""The measures of the code: short files and functions, names of the field, few values of unknown type."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "raytrain"
LONGEST_FILE = 400  # lines
LONGEST_FUNCTION = 60
LONG_FUNCTION = 40
MOST_LONG_FUNCTIONS = 0.02
MEDIAN_FUNCTION = 8
# Words that say nothing of what they name, and that nobody can search for.
PRONOUNS = {"one", "ones", "found", "own", "other", "others", "some", "every", "known", "place", "places"}
MOST_PRONOUNS = 0.003
MOST_PLAIN_DICTS = 80
MOST_ANY = 0.01
Function = ast.FunctionDef | ast.AsyncFunctionDef
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def functions() -> Iterator[tuple[Path, Function]]:
    for path, tree in TREES.items():
        yield from ((path, node) for node in ast.walk(tree) if isinstance(node, Function))


def length(function: Function) -> int:
    return function.end_lineno - function.lineno + 1


def names(tree: ast.AST) -> Iterator[str]:
    """Names of variables, attributes, arguments, functions and classes, each time that they occur."""
    for node in ast.walk(tree):
        match node:
            case ast.Name():
                yield node.id
            case ast.Attribute():
                yield node.attr
            case ast.arg():
                yield node.arg
            case ast.keyword() if node.arg:
                yield node.arg
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_has_at_most_400_lines_and_its_functions_60(path: Path):
    assert len(path.read_text().splitlines()) <= LONGEST_FILE
    too_long = [node.name for node in ast.walk(TREES[path]) if isinstance(node, Function) and length(node) > 60]
    assert too_long == []


def test_functions_are_short():
    lengths = sorted(length(function) for _, function in functions())
    assert lengths[len(lengths) // 2] <= MEDIAN_FUNCTION
    assert sum(number > LONG_FUNCTION for number in lengths) <= MOST_LONG_FUNCTIONS * len(lengths)


def test_names_are_nouns_and_verbs_of_the_field():
    total = 0
    pronouns: dict[str, int] = {}
    for path, tree in TREES.items():
        for name in names(tree):
            total += 1
            if set(name.strip("_").split("_")) & PRONOUNS and not name.endswith("_every_steps"):
                label = f"{path.relative_to(PACKAGE)}: {name}"
                pronouns[label] = pronouns.get(label, 0) + 1
    assert sum(pronouns.values()) <= MOST_PRONOUNS * total, pronouns


def test_few_dictionaries_of_anything_travel():
    numbers = {path: len(re.findall(r"\bdict\[str, Any\]", path.read_text())) for path in FILES}
    assert sum(numbers.values()) <= MOST_PLAIN_DICTS, {str(path): number for path, number in numbers.items() if number}


def test_few_parameters_have_any_type():
    parameters = [
        (path, function.name, argument)
        for path, function in functions()
        for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        if argument.arg not in ("self", "cls")
    ]
    untyped = [
        f"{path.relative_to(PACKAGE)}: {function}({argument.arg})"
        for path, function, argument in parameters
        if argument.annotation is None or ast.unparse(argument.annotation) == "Any"
    ]
    assert len(untyped) < MOST_ANY * len(parameters), untyped


def test_each_folder_says_what_lives_there():
    for folder in sorted({path.parent for path in FILES}):
        docstring = ast.get_docstring(TREES[folder / "__init__.py"])
        assert docstring and len(docstring) > 60, f"{folder.relative_to(PACKAGE)}/__init__.py needs its sentences"
