"""The house: the README's table of equations is true, imports run one way, and files keep their budgets."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("small", "chat", "scale", "lab")
FILES = sorted([*ROOT.glob("*.py"), *(p for room in ROOMS for p in (ROOT / room).glob("*.py"))])
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in FILES}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Qualified name and node of every function, method and class."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from definitions(child, f"{prefix}{child.name}.")


def equation_table() -> list[list[str]]:
    """The cells of the README's table that begins with "equation"."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| equation"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def test_every_equation_of_the_paper_is_in_the_table():
    found = {int(n) for row in equation_table() for n in re.findall(r"\((\d+)\)", row[0])}
    assert found == set(range(1, 15))


@pytest.mark.parametrize("row", equation_table(), ids=lambda row: row[0])
def test_what_the_table_of_equations_names_is_there(row):
    _, _, code, tests = row
    places = re.findall(r"`([\w/]+\.py):([\w.]+)`", code)
    assert places, code
    for file, name in places:
        assert name in dict(definitions(tree(ROOT / file))), f"{file}:{name}"
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", tests)
    assert named, tests
    for file, name in named:
        assert name in dict(definitions(tree(ROOT / "tests" / file))), f"{file}::{name}"


@pytest.mark.parametrize("page", ["README.md", *(f"{room}/README.md" for room in ROOMS), "CONTRIBUTING.md"])
def test_every_file_that_a_page_links_or_lists_is_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    folder = (ROOT / page).parent
    for name in re.findall(r"\]\(([\w/.-]+)\)|src=\"([\w/.-]+)\"", text):
        assert (folder / "".join(name)).exists(), name
    for name in re.findall(r"`((?:[\w-]+/)*[\w-]+\.py)(?::[\w.]+)?`", text):
        assert any((place / name).is_file() for place in (ROOT, folder, ROOT / "tests")), name


@cache
def imports(module: str) -> frozenset[str]:
    """The project's modules that a module imports anywhere in it, but for types alone."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            return
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found.update(set(names) & set(MODULES))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree(MODULES[module]))
    return frozenset(found)


def test_no_import_runs_in_a_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " imports ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(imports(module)):
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_the_core_stays_small():
    lines = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in FILES}
    budgets = {"train.py": 420, "model.py": 450, "attention.py": 410}
    assert {name: lines[name] for name in budgets if lines[name] > budgets[name]} == {}
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 220
    assert len(list(ROOT.glob("*.py"))) <= 13 and sum(lines.values()) < 11150
    assert len(imports("train")) <= 10


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_function_and_no_class_is_too_long_to_read(path):
    for name, node in definitions(tree(path)):
        most = 260 if isinstance(node, ast.ClassDef) else 80
        assert node.end_lineno - node.lineno + 1 <= most, name


def test_a_name_is_defined_once():
    """`main` and `parse` belong to each command."""
    where: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in tree(path).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                where.setdefault(node.name, []).append(module)
    assert {k: v for k, v in where.items() if len(v) > 1 and k not in ("main", "parse")} == {}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_text_is_read_or_written_in_an_encoding_or_in_lines_of_the_systems(path):
    """open, read_text and write_text say their encoding; nothing is cut at what Unicode calls a line."""
    for node in (n for n in ast.walk(tree(path)) if isinstance(n, ast.Call)):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        given = {k.arg for k in node.keywords} | {a.value for a in node.args if isinstance(a, ast.Constant)}
        assert name not in ("readlines", "splitlines") or "str(error)" in ast.unparse(node), node.lineno
        if name in ("read_text", "write_text"):
            assert "encoding" in given or isinstance(node.func, ast.Name), node.lineno  # or config.read_text
        elif isinstance(node.func, ast.Name) and name == "open":
            assert "encoding" in given or any("b" in str(x) for x in given), node.lineno
