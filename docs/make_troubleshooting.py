"""Generate docs/troubleshooting.md from the calls that create errors and warnings: `python
docs/make_troubleshooting.py`.

With `--check` nothing is written, and the exit code is 1 if the page is stale. The package is parsed as text; nothing
is imported from it.
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from troubleshooting_texts import END, INDIRECT_WARNINGS, INTRODUCTION, PROBLEMS, REASONS, ROWS, USAGE, WARNINGS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
ROOT_ERROR = "RaytrainError"
SYSTEM_SAYS = "what the system says"
ELSE = " / "  # between alternative texts
Values = dict[str, list[ast.expr]]  # possible values of a name


@dataclass
class Module:
    """A file of the package: its constants by name, and for each call the names that the enclosing function assigns."""

    path: str
    tree: ast.Module
    constants: dict[str, ast.expr] = field(default_factory=dict)

    @cached_property
    def calls(self) -> list[tuple[ast.Call, Values]]:
        """All calls in line order, with the values that the enclosing functions assign to each name."""
        by_name: dict[str, list[ast.Call]] = {}
        found: dict[ast.Call, Values] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                by_name.setdefault(getattr(node.func, "id", ""), []).append(node)
                found[node] = {}
        for function in ast.walk(self.tree):  # outer functions come before nested ones
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                values: Values = _literal_arguments(function, by_name.get(function.name, []))
                for name, value in _assigned(ast.walk(function)):
                    values.setdefault(name, []).append(value)
                found |= {node: found[node] | values for node in ast.walk(function) if isinstance(node, ast.Call)}
        return sorted(found.items(), key=lambda item: (item[0].lineno, item[0].col_offset))


@dataclass(frozen=True)
class Site:
    """A call that creates an error: its texts as the reader sees them, None for absent ones."""

    module: str
    error: str
    what: str
    why: str | None
    allowed: str | None
    remedy: str | None


def _assigned(nodes: Any) -> Iterator[tuple[str, ast.expr]]:
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value


def _literal_arguments(function: ast.FunctionDef | ast.AsyncFunctionDef, calls: list[ast.Call]) -> Values:
    """Values of parameters for which all calls in the module pass a text."""
    values: Values = {}
    for index, parameter in enumerate(function.args.args):
        given = {ast.unparse(call.args[index]): call.args[index] for call in calls if len(call.args) > index}
        if given and all(map(_is_text, given.values())):
            values[parameter.arg] = list(given.values())
    return values


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def package(root: Path = ROOT) -> list[Module]:
    """All modules by path."""
    modules = []
    for path in sorted((root / "raytrain").rglob("*.py")):
        tree = ast.parse(path.read_text())
        modules.append(Module(path.relative_to(root).as_posix(), tree, dict(_assigned(tree.body))))
    return modules


def error_classes(modules: list[Module]) -> dict[str, str]:
    """Every class of the error tree with its docstring, each after its base."""
    children: dict[str, list[ast.ClassDef]] = {}
    for module in sorted(modules, key=lambda module: module.path != "raytrain/errors.py"):
        for node in ast.walk(module.tree):
            for base in node.bases if isinstance(node, ast.ClassDef) else ():
                if isinstance(base, ast.Name):
                    children.setdefault(base.id, []).append(node)
    found: dict[str, str] = {}
    waiting = [node for node in children["Exception"] if node.name == ROOT_ERROR]
    while waiting:
        node = waiting.pop(0)
        found[node.name] = ast.get_docstring(node) or ""
        waiting = [*children.get(node.name, ()), *waiting]
    return found


class Texts:
    """Renders a module's expressions as the reader sees them: a variable part becomes `‹name›`, or `…` without a
    name."""

    def __init__(self, constants: dict[str, ast.expr], local: Values) -> None:
        self._constants, self._local = constants, local

    def variants(self, node: ast.expr) -> Iterator[Texts]:
        """One rendering per possible value of the names in a message, each a message in itself."""
        parts = (part.value for part in ast.walk(node) if isinstance(part, ast.FormattedValue))
        names = sorted({part.id for part in parts if isinstance(part, ast.Name)} & self._local.keys())
        names = [name for name in names if all(map(_is_text, self._local[name]))]
        for chosen in itertools.product(*(self._local[name] for name in names)):
            local = self._local | {name: [text] for name, text in zip(names, chosen, strict=True)}
            yield Texts(self._constants, local)

    def of(self, node: ast.expr | None, unknown: str | None = "…") -> str | None:
        """The text; `unknown` for what is only known at run time, and None for None."""
        match node:
            case None | ast.Constant(value=None):
                return None
            case ast.Constant(value=value):
                return str(value)
            case ast.JoinedStr(values=values):
                return "".join(self._field(value) for value in values)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return f"{self.of(left)}{self.of(right)}"
            case ast.BinOp(left=left, op=ast.Mod()):
                return (self.of(left) or "").replace("%s", "…")
            case ast.IfExp(body=body, orelse=other):
                return ELSE.join(dict.fromkeys(filter(None, (self.of(body, unknown), self.of(other, unknown)))))
            case ast.BoolOp(op=ast.Or(), values=values):
                return ELSE.join(dict.fromkeys(filter(None, (self.of(value, unknown) for value in values))))
            case ast.Name(id=name) if name in self._local:
                return ELSE.join(dict.fromkeys(filter(None, (self.of(one, unknown) for one in self._values(name)))))
            case ast.Name(id=name) if name in self._constants:
                return self.of(self._constants[name], unknown)
            case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Dict(keys=items) if items:
                return ", ".join(self.of(item) or "" for item in items)
            case ast.Call(
                func=ast.Attribute(value=ast.Constant(value=str(gap)), attr="join"), args=[ast.Name(id=name)]
            ):
                known = self._constants.get(name)
                return (self.of(known) or "").replace(", ", gap) if known and name not in self._local else unknown
        return unknown

    def _values(self, name: str) -> list[ast.expr]:
        """Possible values of a name; a value that refers to the name itself is not followed."""
        values = self._local[name]
        return [one for one in values if not any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(one))]

    def _field(self, node: ast.expr) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        match node.value:
            case ast.Name(id=name) if len(values := self._local.get(name, [])) == 1 and _is_text(values[0]):
                return values[0].value
            case ast.Name(id=name) if isinstance(known := self._constants.get(name), ast.Constant):
                return format(known.value, self.of(node.format_spec) or "")
            case ast.Attribute(attr="__name__"):
                return "…"
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Subscript(slice=ast.Constant(value=str(name))):
                return f"‹{name.lstrip('_')}›"
        return "…"


def error_sites(modules: list[Module]) -> list[Site]:
    """Every call that creates an error of the tree, except those that only rebuild one from its parts."""
    sites = []
    for module, call, texts in _called(modules, *error_classes(modules)):
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        for variant in texts.variants(call.args[0]):
            why, allowed = variant.of(given.get("why"), SYSTEM_SAYS), variant.of(given.get("allowed"))
            remedy = variant.of(given.get("remedy"))
            if remedy and not re.search(r"\w", remedy):
                remedy = "as the message says"
            name, what = ast.unparse(call.func).rpartition(".")[2], variant.of(call.args[0])
            sites.append(Site(module.path, name, what, why, None if allowed == "…" else allowed, remedy))
    return sites


def _shared(modules: list[Module]) -> dict[str, ast.expr]:
    """Public constants, which other modules may import."""
    return {name: value for module in modules for name, value in module.constants.items() if name.isupper()}


def _called(modules: list[Module], *names: str) -> Iterator[tuple[Module, ast.Call, Texts]]:
    """All calls with arguments to functions or methods with these names."""
    shared = _shared(modules)
    for module in modules:
        for call, local in module.calls:
            called = ast.unparse(call.func)
            if call.args and any(called == name or called.endswith(f".{name}") for name in names):
                yield module, call, Texts({**shared, **module.constants}, local)


def warnings(modules: list[Module]) -> list[str]:
    """The text of every warning."""
    texts_of_warnings = []
    for module, call, texts in _called(modules, "warn", "warning"):
        text = texts.of(call.args[0], None)
        texts_of_warnings += [text.replace("%s", "…")] if text else INDIRECT_WARNINGS.get(module.path, [])
    return list(dict.fromkeys(texts_of_warnings))


def listed_problems(modules: list[Module]) -> list[str]:
    """Texts of the problems with settings or a model that an error lists."""
    calls = _called(modules, "problems.append", "ValueError")
    found = [texts.of(call.args[0]) or "" for _, call, texts in calls]
    return [text for text in dict.fromkeys(found) if re.search(r"\w", text)]


def usage_errors(modules: list[Module]) -> list[str]:
    """Usage errors of the command line, as displayed."""
    messages = []
    for _, call, texts in _called(modules, "BadParameter"):
        hint = texts.of(next((keyword.value for keyword in call.keywords if keyword.arg == "param_hint"), None))
        text = texts.of(call.args[0])
        messages += [f"Invalid value for {hint}: {text}" if hint else f"Invalid value: {text}"]
    return [text for text in dict.fromkeys(messages) if text != "Invalid value: …"]


def bad_row_reasons(modules: list[Module]) -> list[str]:
    """Every reason for rejecting a row, from `REASONS` and from calls that pass one."""
    found: dict[str, None] = {}
    for module in modules:
        if module.path in ("raytrain/data/corpora/rows.py", "raytrain/data/probe.py", "raytrain/lengths/plan.py"):
            found |= dict.fromkeys(filter(None, ast.literal_eval(module.constants["REASONS"])))
        for node in ast.walk(module.tree) if module.path.startswith("raytrain/data/") else ():
            match node:
                case ast.Return(value=ast.Tuple(elts=[ast.Constant(value=str(reason)), _])) if reason.isidentifier():
                    found[reason] = None
    return list(found)


def code(text: str) -> str:
    """Markdown inline code on one line, for any text."""
    text = " ".join(text.split())
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def prose(text: str) -> str:
    """Escape text for Markdown; text between backticks stays code."""
    parts = " ".join(text.split()).split("`")
    if len(parts) % 2 == 0:
        return code(text)
    for index in range(0, len(parts), 2):
        parts[index] = parts[index].replace("&", "&amp;").replace("<", "&lt;")
        parts[index] = re.sub(r"([*\[|\\]|\b_|_\b)", r"\\\1", parts[index])
    return "`".join(parts)


def _entries(sites: list[Site]) -> Iterator[str]:
    """A list of messages, in module order; messages that differ only in names are listed once."""
    alike: dict[str, list[Site]] = {}
    for site in sites:
        alike.setdefault(re.sub("‹.*?›", "…", site.what), []).append(site)
    for same in alike.values():
        yield f"- {code(same[0].what)}"
        for label, name in (("cause", "why"), ("allowed", "allowed"), ("to do", "remedy")):
            texts = [text for site in same for text in (getattr(site, name) or "").split(ELSE) if text]
            if texts:
                yield f"  - {label}: {'; or '.join(map(prose, dict.fromkeys(texts)))}"


def make_page(modules: list[Module]) -> str:
    """The whole page."""
    sites, lines = error_sites(modules), [INTRODUCTION]
    for name, meaning in error_classes(modules).items():
        lines += [f"### {name}", "", " ".join(meaning.split()), ""]
        lines += [*_entries([site for site in sites if site.error == name]), ""]
    lines += [USAGE, *(f"- {code(text)}" for text in usage_errors(modules)), ""]
    lines += [PROBLEMS, *(f"- {code(text)}" for text in listed_problems(modules)), "", ROWS]
    for reason in bad_row_reasons(modules):
        meaning, remedy = REASONS.get(reason, ("", ""))
        lines.append(f"| `{reason}` | {meaning} | {remedy} |")
    lines += ["", "## Warnings", "", "A warning does not stop the command.", ""]
    for text in warnings(modules):
        lines += [f"- {code(text)}", f"  - {WARNINGS.get(text, '')}"]
    return "\n".join([*lines, "", END])


def main() -> int:
    """Write the page, or with `--check` report whether it is current."""
    page = make_page(package())
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page)
        return 0
    if PAGE.exists() and PAGE.read_text() == page:
        return 0
    print("docs/troubleshooting.md is stale: python docs/make_troubleshooting.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
