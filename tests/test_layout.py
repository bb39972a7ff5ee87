"""The three top-level folders, the package list and the links have to agree."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"sonde": ROOT / "sonde", "hooks": ROOT / "hooks", "integrations": ROOT / "integrations"}


def packages_on_disk() -> list[str]:
    found = []
    for top, folder in FOLDERS.items():
        prefix = "sonde" if top == "sonde" else f"sonde.{top}"
        # rglob does not follow the links sonde/hooks and sonde/integrations.
        for init in folder.rglob("__init__.py"):
            parts = init.parent.relative_to(folder).parts
            if not (top == "sonde" and parts[:1] in (("hooks",), ("integrations",))):
                found.append(".".join((prefix, *parts)))
    return sorted(found)


def test_pyproject_lists_every_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = text.split("packages = [")[1].split("]")[0]
    assert sorted(name.strip(' ",') for name in listed.split()) == packages_on_disk()


@pytest.mark.parametrize("name", ["hooks", "integrations"])
def test_links_point_at_the_top_level_folders(name: str) -> None:
    assert (ROOT / "sonde" / name).resolve() == ROOT / name


def test_hooks_are_imported_under_one_name() -> None:
    import sonde.hooks.recording.recorder

    assert sonde.hooks.recording.recorder.__name__ == "sonde.hooks.recording.recorder"
    assert "hooks" not in sys.modules
