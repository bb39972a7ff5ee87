"""Every road on which a run is read, tried on one that cannot be trusted."""

from __future__ import annotations

import contextlib
import io
import json
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from sonde import analysis
from sonde.cli.facts import describe, overview
from sonde.cli.results import print_cka
from sonde.cli.show import print_overviews, print_run
from sonde.exceptions import DamageError, FormatError, SondeError
from sonde.log import Run, open_run
from sonde.log.export import export_run
from sonde.log.sealing.seal import seal_run
from sonde.log.verify import verify_run


def read_all(run: Run) -> Iterator[str]:
    """Read every array there is; yield the errors of those that cannot be read."""
    for measure in run.measures:
        for source in run.sources(measure):
            log = run[measure, source]
            for step in log.steps:
                for layer, field in log.describe(step):
                    try:
                        log.array(field, step, layer)
                    except (DamageError, FormatError) as error:
                        yield str(error)
                    except SondeError:
                        pass  # It says that the array is not what it should be.
            with contextlib.suppress(SondeError):
                repr((log.ids, log.targets, log.num_bytes, log.attributes(), log.time()))


def show(run: Run) -> None:
    facts = describe(run)
    json.dumps(facts, default=str)
    print_run(facts, all_layers=True, all_steps=True)


def look(run: Run) -> None:
    repr((run, run.state, run.attempts, run.notes, run.layers, run.steps(), run.damage))
    assert "<script" not in run._repr_html_()


def draw(run: Run) -> None:
    similarity = analysis.cka(run, layers=["fc", "conv.1"])
    print_cka(similarity, "CKA")


def faults_of(path: Path, scratch: Path, *, is_wide: bool) -> list[str]:
    """Try every road on a run; return what ended otherwise than in a result or one plain line.

    Args:
        path: The run.
        scratch: A folder to write into.
        is_wide: Try the slower roads, too.
    """
    faults: list[str] = []
    printed = io.StringIO()

    def attempt(name: str, road: Callable[[], object]) -> object:
        try:
            with contextlib.redirect_stdout(printed), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return road()
        except (SondeError, OSError) as error:
            if any(not char.isprintable() for char in str(error)) or len(str(error)) > 10_000:
                faults.append(f"{name}: an error cannot be shown: {str(error)[:500]!r}")
            return error
        except BaseException:
            faults.append(f"{name}: {traceback.format_exc(limit=-4)}")
            return None

    run = attempt("open", lambda: open_run(path))
    verified = attempt("verify", lambda: verify_run(path))
    attempt("ls", lambda: print_overviews([overview(path)]))
    if isinstance(run, Run):
        opened = run
        unread = attempt("read", lambda: list(read_all(opened)))
        if unread and verified == []:
            faults.append(f"verify says that it is intact: {unread}")
        attempt("look", lambda: look(opened))
        attempt("show", lambda: show(opened))
        attempt("cka", lambda: draw(opened))
        if is_wide:
            attempt("stiffness", lambda: analysis.stiffness(opened, by="class"))
            attempt("to_xarray", lambda: repr(opened.to_xarray()))
            attempt("export", lambda: export_run(opened, scratch / "out.h5", overwrite=True))
            attempt("tensorboard", lambda: _tensorboard(opened, scratch / "board"))
    elif verified == []:
        faults.append(f"verify says that it is intact, and it cannot be opened: {run!r}")
    if is_wide and path.is_dir():
        attempt("seal", lambda: seal_run(path))
        attempt("open sealed", lambda: list(read_all(open_run(path))))
    seen = printed.getvalue()
    if any(not char.isprintable() for char in seen if char != "\n"):
        faults.append("characters that cannot be seen reach the terminal")
    if len(seen) > 200_000:
        faults.append(f"{len(seen)} characters are printed")
    return faults


def _tensorboard(run: Run, folder: Path) -> None:
    from sonde.integrations.tensorboard import export

    export(run, folder, max_images=0)
