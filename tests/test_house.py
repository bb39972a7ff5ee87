"""The house: who may import whom, and how wide a folder is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_SIBLINGS = 15

# In the training process: each folder may import those before it, and none after it.
HOOKS = [
    "model",
    "stores",
    "examples",
    "losses",
    "training",
    "gradients",
    "measures",
    "recording",
    "config",
]
# Offline: what must work without torch, and without what runs in a training.
OFFLINE = ("sonde.log", "sonde.analysis", "sonde.cli")
TRAINING_SIDE = ("torch", "sonde.hooks", "sonde.integrations")


def modules() -> dict[str, Path]:
    """Return every module of the project, by the name under which it is imported."""
    found = {}
    for top in ("sonde", "hooks", "integrations"):
        for path in (ROOT / top).rglob("*.py"):  # It does not follow the links in sonde/.
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if top == "sonde" else ("sonde", *parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def folder_of(module: str) -> str:
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


def imports(module: str, *, lazy: bool = True) -> Iterator[str]:
    """Yield what a module imports: modules of the project, and the names of others."""
    tree = ast.parse(MODULES[module].read_text())
    nodes = ast.walk(tree) if lazy else iter(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder_of(module).split(".")
            above = base[: len(base) - node.level + 1] if node.level else []
            name = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                inside = f"{name}.{alias.name}"
                yield inside if inside in MODULES else name


def folder_edges() -> dict[str, set[str]]:
    edges: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        if path.name in ("__init__.py", "__main__.py"):
            continue  # A public face imports from below it, and nothing below imports it.
        for target in imports(module):
            if target in MODULES and folder_of(target) != folder_of(module):
                edges.setdefault(folder_of(module), set()).add(folder_of(target))
    return edges


def test_folders_form_no_circle() -> None:
    TopologicalSorter(folder_edges()).prepare()  # It raises, and names the circle.


def test_rooms_of_hooks_import_only_those_before_them() -> None:
    wrong = []
    for module in MODULES:
        room = module.split(".")[2:3] if module.startswith("sonde.hooks.") else []
        if not room or room[0] not in HOOKS:
            continue
        for target in imports(module):
            other = target.split(".")[2:3] if target.startswith("sonde.hooks.") else []
            if other and other[0] in HOOKS[HOOKS.index(room[0]) + 1 :]:
                wrong.append(f"{module} imports {target}")
    assert not wrong


@pytest.mark.parametrize("package", OFFLINE)
def test_what_reads_a_log_imports_nothing_of_the_training(package: str) -> None:
    wrong = [
        f"{module} imports {target}"
        for module in MODULES
        if module.startswith(package)
        for target in imports(module, lazy=package != "sonde.cli")
        if target.startswith(TRAINING_SIDE)
    ]
    assert not wrong


def test_no_folder_is_wide() -> None:
    folders: dict[Path, int] = {}
    for path in MODULES.values():
        folders[path.parent] = folders.get(path.parent, 0) + (path.name != "__init__.py")
    wide = [
        str(path.relative_to(ROOT)) for path, number in folders.items() if number > MAX_SIBLINGS
    ]
    assert not wide


def test_the_check_sees_imports_of_every_form() -> None:
    """A check that reads imports wrongly would pass; it is tried on known ones."""
    assert "sonde.hooks.measures.layer_measure" in set(imports("sonde.hooks.measures.activations"))
    assert "torch" in set(imports("sonde.hooks.model.taps"))
    assert folder_edges()["sonde.analysis"] >= {"sonde.log"}
