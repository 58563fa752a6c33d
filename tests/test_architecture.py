"""Imports go one way, and what must not be in the source is not in it. Read from the syntax tree."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "swiftwan"

LAYERS = (
    ("collector", "errors", "places", "quiet"),
    ("whole_file",),
    ("device", "ops", "pocket", "prompt_cache", "unipc"),
    ("ceilings", "models"),
    ("sampling", "guidance", "progressive", "pipelines.request"),
    ("inputs", "media", "weights"),
    ("facts", "techniques"),
    ("composition",),
    ("work",),
    ("estimate",),
    ("recipes",),
    ("plan",),
    ("memory",),
    ("pipelines",),
    ("engine",),
    ("measure",),
    ("bench",),
    ("train",),
    ("serve.jobs",),
    ("serve.http",),
    ("serve.page",),
    ("serve",),
    ("cli",),
    ("__init__", "__main__"),  # the doors: they see everything, nothing sees them
)
"""From the bottom to the top. A module imports from its own name and from the lines above it here;
names on one line do not know each other."""

UPWARD = {
    ("pipelines", "engine"): "a pipeline runs on an engine, and names its type",
}
"""Imports against the order, each inside a function or for type checking only, with its reason."""


def modules() -> dict[str, Path]:
    """Every module by its dotted name below swiftwan; a package by its own name."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def layer(module: str) -> tuple[int, str]:
    """Height and name of the layer that a module belongs to: the longest name in the table that fits."""
    fits = [
        (len(name), height, name)
        for height, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    assert fits, f"'{module}' is in no layer; add it to LAYERS in {Path(__file__).name}, and say where it stands"
    _, height, name = max(fits)
    return height, name


def imports(path: Path, module: str, known: dict[str, Path]) -> Iterator[tuple[int, str, bool]]:
    """Each import of swiftwan's own: line, imported module, and whether importing the file runs it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ["swiftwan", *filter(None, package.split("."))]
                base = ".".join(filter(None, [*above[: len(above) - node.level + 1], base]))
            below = base.removeprefix("swiftwan").removeprefix(".")
            names = [
                f"{base}.{alias.name}" if f"{below}.{alias.name}".lstrip(".") in known else base for alias in node.names
            ]
        else:
            continue
        for name in names:
            if name == "swiftwan":
                yield node.lineno, "__init__", id(node) not in late
            elif name.startswith("swiftwan."):
                yield node.lineno, name.removeprefix("swiftwan."), id(node) not in late


def complaint(module: str, imported: str, *, at_import: bool) -> str | None:
    """Why ``module`` must not import ``imported``; None where it may."""
    (height, own), (other_height, other) = layer(module), layer(imported)
    if own == other or other_height < height:
        return None
    if (own, other) in UPWARD:
        return f"only inside a function ({UPWARD[own, other]})" if at_import else None
    return f"'{own}' does not know '{other}'"


@pytest.mark.parametrize("module", modules())
def test_imports_go_one_way(module: str) -> None:
    known = modules()
    wrong = [
        f"src/swiftwan/{known[module].relative_to(SOURCE)}:{line} imports {imported}: {why}"
        for line, imported, at_import in imports(known[module], module, known)
        if (why := complaint(module, imported, at_import=at_import))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source", "line"),
    [
        ("ops.rope", "from swiftwan.models.dit import WanTransformer", 1),
        ("models.dit", "import swiftwan.weights.load", 1),
        ("models.dit", "def late():\n    from swiftwan import engine", 2),
        ("ops.rope", "from ..models import dit", 1),
        ("models.dit", "if TYPE_CHECKING:\n    from swiftwan.engine import Engine", 2),
        ("techniques.compile", "from swiftwan.engine import Engine", 1),
        ("pipelines.request", "from swiftwan import media", 1),
        ("pocket.judge", "from swiftwan.ops.rope import rope_tables", 1),
        ("train.loop", "import swiftwan", 1),
    ],
)
def test_the_test_sees_an_import_that_goes_up(tmp_path: Path, module: str, source: str, line: int) -> None:
    path = tmp_path / "planted.py"
    path.write_text(source)
    known = modules() | dict.fromkeys(("engine", "models.dit", "media"), path)
    seen = [
        at
        for at, imported, at_import in imports(path, module, known)
        if complaint(module, imported, at_import=at_import)
    ]
    assert seen == [line]


def test_a_module_outside_the_table_is_told() -> None:
    with pytest.raises(AssertionError, match="'utils' is in no layer"):
        layer("utils")


FORBIDDEN = {
    "print": "the library is silent; the command line uses typer.echo",
    "torch.load": "weights are tensors alone: only weights.sources loads, with weights_only=True",
    "pickle": "weights are safetensors: nothing that is loaded may run code",
    "cPickle": "weights are safetensors: nothing that is loaded may run code",
    "dill": "weights are safetensors: nothing that is loaded may run code",
    "cloudpickle": "weights are safetensors: nothing that is loaded may run code",
    "joblib": "weights are safetensors: nothing that is loaded may run code",
    "trust_remote_code": "a checkpoint brings numbers, not code",
    "eval": "text is never run",
    "exec": "text is never run",
}


SAFE_LOADER = "weights.sources"
"""Where ``torch.load`` may stand, with ``weights_only=True`` written out: the .pth files of the original Wan."""


def forbidden(tree: ast.AST, module: str = "") -> Iterator[tuple[int, str]]:
    """Line and name of each use of something forbidden."""
    allowed = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and module == SAFE_LOADER
        and ast.unparse(node.func) == "torch.load"
        and any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
    }
    for node in ast.walk(tree):
        if id(node) in allowed:
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            base = node.module or ""
            names = [base.partition(".")[0], *(f"{base}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = [node.func.id]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.keyword):
            names = [node.arg or ""]
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            names = [node.value]
        yield from ((getattr(node, "lineno", 0), name) for name in names if name in FORBIDDEN)


@pytest.mark.parametrize("module", modules())
def test_nothing_prints_unpickles_or_runs_a_checkpoints_code(module: str) -> None:
    path = modules()[module]
    wrong = [
        f"src/swiftwan/{path.relative_to(SOURCE)}:{line}: {name}: {FORBIDDEN[name]}"
        for line, name in forbidden(ast.parse(path.read_text(encoding="utf-8")), module)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        "print('hello')",
        "import torch\nweights = torch.load('a.pth')",
        "from torch import load",
        "import pickle",
        "from pickle import loads",
        "build(trust_remote_code=True)",
        "build(**{'trust_remote_code': True})",
    ],
)
def test_the_test_sees_what_is_forbidden(source: str) -> None:
    assert list(forbidden(ast.parse(source)))
    assert list(forbidden(ast.parse(source), SAFE_LOADER))


def test_tensors_alone_may_be_loaded_in_one_place() -> None:
    safe = ast.parse("weights = torch.load('a.pth', weights_only=True)")
    assert not list(forbidden(safe, SAFE_LOADER))
    assert list(forbidden(safe, "weights.load"))
    assert list(forbidden(ast.parse("torch.load('a.pth', weights_only=False)"), SAFE_LOADER))
