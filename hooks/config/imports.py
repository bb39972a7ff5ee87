"""What a configuration file names: only where it says `entry`, code is run, which is said first."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from contextlib import suppress
from functools import lru_cache
from typing import Any

from sonde.visible import TEXT_LENGTH, visible

from .places import Place

# Any, in this file: whatever is imported.


def entry(name: Any, place: Place) -> Any:
    """Import `package.module:function`, or `file.py:function` relative to the file's folder.

    This runs code, which is said on stderr before; nothing else in a configuration file does.

    Raises:
        InvalidInputError: If there is no such file, module or function.
    """
    source, _, attribute = name.rpartition(":") if isinstance(name, str) else ("", "", "")
    if not source or not attribute:
        raise place.unexpected(name, "`package.module:function` or `file.py:function`")
    _say_once(f"{place.file}: {place.keys}: runs {name}")
    if not source.endswith(".py"):
        return _dotted(f"{source}.{attribute}", place)
    path = place.file.parent / source
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise place.error(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    # Its classes are looked up by the name of their module, when they are pickled, for example.
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    if not hasattr(module, attribute):
        raise place.unknown(attribute, dir(module), f"name in {path}")
    return getattr(module, attribute)


def imported(name: str, place: Place) -> Any:
    """Return what a dotted name stands for in a module that somebody has imported already.

    Raises:
        InvalidInputError: If nobody has.
    """
    module_name, _, rest = name.rpartition(".")
    while module_name and module_name not in sys.modules:
        module_name, _, last = module_name.rpartition(".")
        rest = f"{last}.{rest}"
    if not module_name:
        source, _, last = name.rpartition(".")
        raise place.error(
            f"got {name!r}, whose module is not imported yet, and a configuration file imports "
            f"none; import it before, or write {{entry: {source}:{last}}}, which runs it"
        )
    return _attribute(sys.modules[module_name], rest, place)


def _dotted(name: str, place: Place) -> Any:
    """Import what a dotted name, such as `torch.nn.functional.cross_entropy`, stands for.

    Raises:
        InvalidInputError: If there is no such module, or nothing of this name in it.
    """
    module_name, _, rest = name.rpartition(".")
    while module_name:
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            # It may be a class; but a module that lacks one that it imports is something else.
            if not f"{module_name}.".startswith(f"{error.name}."):
                raise place.error(f"cannot import {module_name}: {error}") from error
            module_name, _, last = module_name.rpartition(".")
            rest = f"{last}.{rest}"
            continue
        return _attribute(found, rest, place)
    raise place.unexpected(name, "the dotted name of something that can be imported")


def _attribute(found: Any, names: str, place: Place) -> Any:
    for part in names.split("."):
        if not hasattr(found, part):
            raise place.unknown(part, dir(found), f"name in {found.__name__}")
        found = getattr(found, part)
    return found


@lru_cache(maxsize=256)
def _say_once(line: str) -> None:
    with suppress(AttributeError, OSError, ValueError):  # There is no stderr, or it is closed.
        print(f"sonde: {visible(line, TEXT_LENGTH)}", file=sys.stderr, flush=True)
