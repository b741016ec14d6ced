"""The package's layers: what may import what, read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "sfllava_fast"
LAYERS = "layouts", "video", "ops", "model", "reduction", "engine"  # each imports those before it, and loose modules
ENTRIES = "patch", "serving", "batch", "inspect", "embedded", "cli"  # none imports another; cli may import all
FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[tuple[str, ...], str]]:
    """(module below the package, name) of every import of the package in a file, those inside functions too."""
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = package[: len(package) - node.level + 1] + module
            elif module[:1] == ("sfllava_fast",):
                base = module[1:]
            else:
                continue
            yield from ((base, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            yield from ((tuple(name[1:-1]), name[-1]) for name in names if name[0] == "sfllava_fast")


def part(module: tuple[str, ...], name: str) -> str:
    """The layer, entry point or loose module that an import reaches; "" is the package itself."""
    parts = *module, name
    return parts[0] if module or (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists() else ""


def rank(name: str) -> int:
    if name in ENTRIES:
        return len(LAYERS) + (name == "cli")
    return LAYERS.index(name) if name in LAYERS else -1


def arrows() -> Iterator[tuple[str, str, str]]:
    for path in FILES:
        source = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module, name in imports(path):
            target = part(module, name)
            if target and target != source:
                yield str(path.relative_to(PACKAGE)), source, target


def test_every_folder_is_a_layer_or_an_entry_point():
    folders = {path.relative_to(PACKAGE).parts[0] for path in FILES if path.parent != PACKAGE}
    assert folders == {*LAYERS, *ENTRIES}


def test_imports_point_to_lower_layers():
    wrong = [
        f"{path} imports {target}"
        for path, source, target in arrows()
        if source not in ("__init__", "__main__") and rank(target) >= rank(source) > -1
    ]
    assert not wrong


def test_dropins_do_without_the_engine():
    """But for the model of lmms-eval, which is the engine."""
    importing = [path for path, source, target in arrows() if source in ("patch", "serving") and target == "engine"]
    assert set(importing) <= {"serving/lmms_eval.py"}


def test_loose_modules_import_no_layer():
    loose = {path.stem for path in FILES if path.parent == PACKAGE} - {"__init__", "__main__"}
    wrong = [f"{path} imports {target}" for path, source, target in arrows() if source in loose and rank(target) > -1]
    assert not wrong


@pytest.mark.parametrize("folder", ["sfllava_fast", "kernels", "bench"])
def test_no_private_name_is_imported(folder):
    wrong = []
    for path in sorted((PACKAGE.parent / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("sfllava_fast")):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                private = [name for name in names if name.startswith("_") and not name.startswith("__")]
                wrong += [f"{path.name} imports {name}" for name in private if name not in ("_bench", "_triton")]
    assert not wrong
