"""Run an unedited script and record the training in it: what `sonde run` does.

The script runs as `__main__`, as `python` would run it: with its arguments, its folder on the path,
its exit code, and tracebacks without our frames. PyTorch is not imported before the script does so,
as scripts may set what PyTorch reads when it is imported; then its training is watched for.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from sonde.exceptions import InvalidInputError, RunExistsError
from sonde.log.format.endings import why_ended
from sonde.log.format.files import RUN_FILE
from sonde.visible import visible_lines

if TYPE_CHECKING:
    from .watch import Watch


_STORES = re.compile(r"gram|full|sketch:[1-9]\d*")


@dataclass(frozen=True)
class Launch:
    """What is to be run, and how it is recorded.

    Attributes:
        target: The path of a script, or the name of a module.
        arguments: Its arguments.
        is_module: It is a module, as with `python -m`.
        out: The run directory; None takes `runs/NAME`, with a number where that exists.
        config: A configuration file.
        layers: Selectors of layers.
        every: The distance of due steps; None is log-spaced.
        examples: How many examples of the first batches are the probe; None takes what the first
            batches hold.
        store: The form kept of activations: `gram`, `full` or `sketch:N`; None is `gram`.
    """

    target: str
    arguments: Sequence[str] = ()
    is_module: bool = False
    out: Path | None = None
    config: Path | None = None
    layers: Sequence[str] = ()
    every: int | None = None
    examples: int | None = None
    store: str | None = None

    @property
    def name(self) -> str:
        """What the run is called after."""
        return self.target.rpartition(".")[2] if self.is_module else Path(self.target).stem


def check(launch: Launch) -> None:
    """Refuse what is wrong before the script starts.

    Raises:
        InvalidInputError: If there is no such script, or an option is out of range.
        RunExistsError: If the run directory holds a run.
        SondeError: If the configuration has no meaning.
        OSError: If the configuration cannot be read.
    """
    if not launch.is_module and not Path(launch.target).is_file():
        raise InvalidInputError(f"there is no script {launch.target}")
    if launch.every is not None and launch.every < 1:
        raise InvalidInputError(f"`--every` (={launch.every}) must be >= 1")
    if launch.examples is not None and launch.examples < 2:
        raise InvalidInputError(f"`--examples` (={launch.examples}) must be >= 2")
    if launch.store is not None and launch.config is not None:
        raise InvalidInputError("`--store` beside `--config`; say `store:` in the file")
    if launch.store is not None and not _STORES.fullmatch(launch.store):
        raise InvalidInputError(f"`--store` (={launch.store}) must be gram, full or sketch:N")
    is_first = os.environ.get("RANK", "0") == "0"
    if launch.config is None:
        if is_first and launch.out is not None and (launch.out / RUN_FILE).exists():
            raise RunExistsError(f"{launch.out} already holds a run; give another --out")
        return
    _put_on_path(launch)  # The file may name functions of modules beside the script.
    from .config import check_config

    check_config(launch, is_first=is_first)


def run(launch: Launch) -> None:
    """Run a script, and record the training in it; returns where the script ends.

    What the script raises is raised, `SystemExit` too, to be the end of this process.

    Args:
        launch: What to run; it has passed `check`.
    """
    watches: list[Watch] = []

    def on_import() -> None:
        try:
            from .watch import Watch

            watches.append(Watch(launch))
        except Exception as error:  # Whatever it is, the script has to run.
            tell(f"nothing is recorded: {type(error).__name__}: {error}")

    _put_on_path(launch)
    _call_after_import("torch", on_import)
    try:
        code, main = _load(launch)
    except InvalidInputError as error:
        tell(str(error))
        sys.exit(1)
    reason = "closed"
    try:
        sys.modules["__main__"] = main
        exec(code, vars(main))
    except BaseException as error:
        reason = why_ended(error)
        _hide_our_frames(main)
        raise
    finally:
        for watch in watches:
            watch.finish(reason)
        if not watches:
            tell(f"nothing was recorded: {_why_unwatched()}")


def _why_unwatched() -> str:
    if "torch" in sys.modules:
        return "torch was imported in a way that cannot be seen"
    return "the script did not import torch"


def tell(message: str) -> None:
    """Say something in a line on stderr."""
    line = " ".join(message.split())
    try:
        print(f"sonde: {visible_lines(line)}", file=sys.stderr, flush=True)
    except (AttributeError, OSError, ValueError):  # There is no stderr, or it is closed.
        return


def _put_on_path(launch: Launch) -> None:
    """Set the first entry of the path as `python` does."""
    if sys.flags.safe_path if sys.version_info >= (3, 11) else False:
        return
    here = os.getcwd() if launch.is_module else os.path.dirname(os.path.realpath(launch.target))
    if sys.path[:1] != [here]:
        sys.path[0] = here


def _load(launch: Launch) -> tuple[CodeType, ModuleType]:
    """Make `__main__`, and the code that runs in it.

    Raises:
        InvalidInputError: If there is no such module.
        SyntaxError: If the script is no Python.
    """
    main = ModuleType("__main__")
    loader: Any
    if launch.is_module:
        spec = _find_module(launch.target)
        loader, path = spec.loader, spec.origin
        code = loader.get_code(spec.name)
        main.__spec__, main.__package__ = spec, spec.parent
        main.__file__ = path
        sys.argv = [str(path), *launch.arguments]
    else:
        sys.argv = [launch.target, *launch.arguments]
        path = os.path.abspath(launch.target)
        loader = SourceFileLoader("__main__", path)
        main.__spec__, main.__package__ = None, None
        main.__file__ = path
        with io.open_code(path) as file:
            source = file.read()
        try:
            code = compile(source, path, "exec", dont_inherit=True)
        except SyntaxError:
            _hide_our_frames(main)
            raise
    main.__loader__ = loader
    vars(main).update(__builtins__=sys.modules["builtins"], __cached__=None)
    vars(main).setdefault("__annotations__", {})
    return code, main


def _find_module(name: str) -> ModuleSpec:
    """Find what `python -m NAME` runs.

    Raises:
        InvalidInputError: If there is nothing to run.
    """
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        raise InvalidInputError(f"there is no module {name}: {error}") from None
    if spec is None or spec.loader is None or not hasattr(spec.loader, "get_code"):
        raise InvalidInputError(f"there is no module {name} to run")
    return spec


def _hide_our_frames(main: ModuleType) -> None:
    """Let the traceback of what now ends this process begin where the script does."""
    names = vars(main)
    hook = sys.excepthook

    def show(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        shown = traceback
        while shown is not None and shown.tb_frame.f_globals is not names:
            shown = shown.tb_next
        hook(kind, error.with_traceback(shown), shown)

    sys.excepthook = show


def _call_after_import(name: str, function: Callable[[], None]) -> None:
    """Call a function once a module has been imported; now, if it is imported already."""
    if name in sys.modules:
        function()
        return

    sys.meta_path.insert(0, _Finder(name, function))


class _Finder(MetaPathFinder):
    """Calls a function once a module has been executed; to ask where it is, executes nothing.

    Args:
        name: The module.
        function: What is called.
    """

    def __init__(self, name: str, function: Callable[[], None]) -> None:
        self._name = name
        self._function = function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the module as the other finders do, with a loader that tells of its execution."""
        if fullname != self._name:
            return None
        for finder in [finder for finder in sys.meta_path if finder is not self]:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    self._extend(spec.loader)
                return spec
        return None

    def _extend(self, loader: Any) -> None:
        execute = loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            del loader.exec_module
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            execute(module)
            self._function()

        loader.exec_module = execute_and_call
