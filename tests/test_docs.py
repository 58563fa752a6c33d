"""What the documents name is there: files, functions and make targets."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import swiftwan
from swiftwan.techniques import TECHNIQUES

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md"))
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]

# A path begins with a folder or file of the repository's root, so that `seconds/step` or a hub id is none.
PATH = re.compile(r"(?<![\w./-])((?:src|tests|docs|benchmarks|examples|\.ci)/[\w./*-]*[\w*/])")
ROOT_FILE = re.compile(r"`([\w-]+\.(?:md|toml|txt)|Makefile|LICENSE)`")
LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)#\s]+)")
MODULE = re.compile(r"\bswiftwan((?:\.[a-z_]+)+)\b")
PUBLIC = re.compile(r"\b(?:swiftwan|sw)\.([A-Z]\w+)")
CODE_NAME = re.compile(r"`([A-Za-z_]\w*(?:\.\w+)?)(?:\(\))?` (?:in|\()[ `(\n]*(src/swiftwan/[\w/]+\.py)")
TARGET = re.compile(r"(?:`|^ {4}|^\$ )make +([a-z][\w-]*)", re.MULTILINE)


def defined(path: Path) -> set[str]:
    """Names that a module defines, and its classes' attributes as ``Class.name``."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = _bound(node)
        found |= names
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for inner in node.body for name in _bound(inner)}
    return found


def _bound(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    return set()


def missing_paths(text: str, folder: Path) -> list[str]:
    """Paths of the repository that a document names and that are not there; links count from its folder."""
    named = {ROOT / path for path in PATH.findall(text) + ROOT_FILE.findall(text)}
    named |= {folder / path for path in LINK.findall(text)}
    missing = []
    for path in named:
        there = any(path.parent.glob(path.name)) if "*" in path.name else path.exists()
        if not there:
            missing.append(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path))
    return sorted(missing)


def missing_names(text: str) -> list[str]:
    """Modules, public names, and functions or classes said to be in a file, that are not there."""
    missing = [f"swiftwan.{name}" for name in PUBLIC.findall(text) if name not in swiftwan.__all__]
    for dotted in MODULE.findall(text):
        *parents, last = dotted.removeprefix(".").split(".")
        home = ROOT.joinpath("src", "swiftwan", *parents)
        files = [home.with_suffix(".py"), home / "__init__.py"]
        is_module = (home / last).is_dir() or (home / f"{last}.py").exists()
        if not is_module and not any(file.exists() and last in file.read_text() for file in files):
            missing.append(f"swiftwan{dotted}")
    for name, path in CODE_NAME.findall(text):
        if (ROOT / path).exists() and name not in defined(ROOT / path):
            missing.append(f"{name} in {path}")
    return missing


def missing_targets(text: str) -> list[str]:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    return sorted(set(TARGET.findall(text)) - targets)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_document_names_is_there(name: str) -> None:
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    assert missing_paths(text, path.parent) == []
    assert missing_names(text) == []
    assert missing_targets(text) == []


def test_the_test_sees_what_is_missing() -> None:
    assert missing_paths("see `src/swiftwan/nowhere.py` and `NOTES.md`", ROOT) == [
        "NOTES.md",
        "src/swiftwan/nowhere.py",
    ]
    assert missing_paths("[more](0099-nothing.md)", ROOT / "docs") == ["docs/0099-nothing.md"]
    assert missing_names("`fold` in `src/swiftwan/models/dit.py`") == ["fold in src/swiftwan/models/dit.py"]
    assert missing_names("`WanTransformer.foo` (`src/swiftwan/models/dit.py`)") == [
        "WanTransformer.foo in src/swiftwan/models/dit.py"
    ]
    assert missing_names("import swiftwan.modles.dit") == ["swiftwan.modles.dit"]
    assert missing_names("engine = sw.Enigne.load()") == ["swiftwan.Enigne"]
    assert missing_targets("run `make tset`") == ["tset"]


def test_decisions_are_numbered_and_have_their_four_parts() -> None:
    decisions = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [path.name[:4] for path in decisions] == [f"{i:04}" for i in range(1, len(decisions) + 1)]
    for path in decisions:
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# {path.name[:4]}: "), path.name
        parts = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert parts == ["Context", "Choice", "Cost", "Revisit when"], path.name


def test_techniques_are_told_and_their_tables_are_those_of_their_rows() -> None:
    text = (ROOT / "docs" / "techniques.md").read_text(encoding="utf-8")
    assert [name for name in TECHNIQUES if f"| `{name}" not in text] == []
    spec = importlib.util.spec_from_file_location("page", ROOT / "benchmarks" / "pocket_techniques_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = module.ROWS.read_text(encoding="utf-8").splitlines()
    assert module.page(text, rows) == text, "run python benchmarks/pocket_techniques_page.py"
    assert {"exact", "near", "approximate"} <= set(module.tables(rows))
    for table in module.tables(rows).values():
        assert table in text
