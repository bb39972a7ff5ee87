"""How the commands print, draw and write the results of the analyses."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from sonde.exceptions import InvalidInputError

from .console import console, plural, table, thinned
from .options import use_no_window

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

MAX_MATRIX_LAYERS = 20
MAX_ROWS = 24

_STIFFNESS = ("within", "between")


def print_cka(similarity: xr.DataArray, title: str) -> None:
    """Print a CKA map: the matrix where it fits, else what each layer is most similar to."""
    out = console()
    layers, others = _names(similarity, "layer"), _names(similarity, "other_layer")
    out.print(title)
    name_width = max(len(name) for name in layers)
    width = 12 if "standard_error" in similarity.coords else 6
    fits = 4 + name_width + width * len(others) <= out.width
    if fits and max(len(layers), len(others)) <= MAX_MATRIX_LAYERS:
        _print_matrix(similarity, layers, others)
        return
    _print_most_similar(similarity, layers, others)
    size = f"{len(layers)} × {len(others)}"
    out.print(
        f"The matrix ({size}) is too large for a table: write it with --csv FILE or --figure FILE."
    )


def print_maps(similarity: xr.DataArray, title: str) -> None:
    """Print a map, or one for each group of runs."""
    keys = [str(key) for key in similarity.dims[:-2]]
    if not keys:
        print_cka(similarity, title)
        return
    console().print(title)
    stacked = similarity.stack(row=keys, create_index=False).transpose("row", ...)
    for part in stacked:
        count = next((name for name in ("num_runs", "num_pairs") if name in part.coords), None)
        if count is not None and not int(part[count]):
            continue
        values = ", ".join(f"{key} {part[key].item()}" for key in keys)
        number = "" if count is None else f" ({int(part[count])} {count.removeprefix('num_')})"
        console().print()
        print_cka(part, f"{values}{number}")


def _print_matrix(similarity: xr.DataArray, layers: list[str], others: list[str]) -> None:
    out = console()
    numbers = [str(column) for column in range(len(others))]
    rows = [[str(row), name, *_with_errors(similarity, row)] for row, name in enumerate(layers)]
    out.print(table(("", "layer", *numbers), rows, right=["", *numbers]))
    if others != layers:
        out.print("columns: " + ", ".join(f"{n} {name}" for n, name in enumerate(others)))


def _with_errors(similarity: xr.DataArray, row: int) -> list[str]:
    """Write the values of a row, with ± the standard error where there is one."""
    texts = [number_text(value) for value in similarity.values[row]]
    if "p_value_of_maximum" in similarity.coords:
        p = similarity["p_value_of_maximum"].values[row]
        level = similarity.attrs["level"]
        texts = [f"{text}*" if at <= level else text for text, at in zip(texts, p, strict=True)]
    if "standard_error" not in similarity.coords:
        return texts
    errors = similarity["standard_error"].values[row]
    pairs = zip(texts, errors, strict=True)
    return [f"{text} ±{number_text(error)}" if error > 0 else text for text, error in pairs]


def _print_most_similar(similarity: xr.DataArray, layers: list[str], others: list[str]) -> None:
    """Print per layer the most similar other one, and the one of the same name or the next."""
    is_within = layers == others and _is_one_side(similarity)
    beside = "next layer" if is_within else "same layer"
    rows = []
    for row, name in enumerate(layers):
        values = dict(zip(others, similarity.values[row].tolist(), strict=True))
        following = layers[row + 1] if row + 1 < len(layers) else ""
        aside = values.get(following if is_within else name, math.nan)
        found = {
            other: value
            for other, value in values.items()
            if not math.isnan(value) and not (is_within and other == name)
        }
        best = max(found, key=lambda other: found[other], default="")
        most = number_text(found.get(best, math.nan))
        rows.append([name, number_text(aside), best or "–", most])
    columns = ("layer", beside, "most similar", "CKA")
    console().print(table(columns, rows, right=(beside, "CKA")))


def _is_one_side(similarity: xr.DataArray) -> bool:
    sides = [(similarity.attrs[f"{o}run"], similarity.attrs[f"{o}step"]) for o in ("", "other_")]
    return sides[0] == sides[1]


def parameters_text(result: xr.Dataset) -> str:
    """Say how many parameters a stiffness is of, and how many had to be left out."""
    included, unsupported = result.attrs["num_parameters"], result.attrs["num_unsupported"]
    if not included + unsupported:
        return "all recorded parameters"
    if not unsupported:
        return plural(included, "parameter")
    return f"{included} of {included + unsupported} parameters (`sonde show` says why)"


def print_stiffness(results: Mapping[str, xr.Dataset]) -> None:
    """Print stiffness over the steps, evenly thinned where there are many."""
    parts = stiffness_columns(results)
    limit = max(3, MAX_ROWS // len(results))
    rows = []
    for name, result in results.items():
        for step in thinned(result["step"].values.tolist(), limit):
            at = result.sel(step=step)
            values = [number_text(float(at[part])) for part in parts]
            rows.append([name, str(step), *values, str(int(at["num_zero_gradients"]))])
    numbers = ("step", *(part.replace("_", " ") for part in parts), "zero gradients")
    console().print(table(("run", *numbers), rows, right=numbers))
    _print_thinned([result.sizes["step"] for result in results.values()], limit)


def stiffness_columns(results: Mapping[str, xr.Dataset]) -> list[str]:
    """Name the variables of stiffness results: within and between classes, or all pairs."""
    grouped = all("cosine_within" in result for result in results.values())
    kinds = ("cosine", "sign")
    return [f"{kind}_{part}" for kind in kinds for part in _STIFFNESS] if grouped else list(kinds)


def print_fragmentation(results: Mapping[str, xr.Dataset]) -> None:
    """Print the number of decision regions, of one run over its steps or of several runs."""
    limit = MAX_ROWS if len(results) == 1 else 3
    rows = []
    for name, result in results.items():
        for step in thinned(result["step"].values.tolist(), limit):
            at = result.sel(step=step)
            values = [float(at[part]) for part in ("fragmentation", "standard_error")]
            rows.append([name, str(step), *(number_text(value) for value in values)])
    numbers = ("step", "regions per plane", "standard error")
    console().print(table(("run", *numbers), rows, right=numbers))
    _print_thinned([result.sizes["step"] for result in results.values()], limit)


def print_reproducibility(result: xr.Dataset, labels: Sequence[str]) -> None:
    """Print the agreement of every pair of runs."""
    rows = []
    for row in range(len(labels)):
        for column in range(row + 1, len(labels)):
            pair = result.isel(run=row, other_run=column)
            text = {name: f"{float(pair[name]):.3f}" for name in pair.data_vars}
            interval = f"{text['low']}–{text['high']}"
            numbers = [text["agreement"], interval, text["chance"], text["kappa"]]
            rows.append([labels[row], labels[column], *numbers])
    percent = f"{100 * result.attrs['confidence']:.0f} % interval"
    names = ("agreement", percent, "chance", "kappa")
    out = console()
    out.print()
    out.print("reproducibility: fraction of the planes where two runs predict the same class")
    out.print(table(("run", "other run", *names), rows, right=names))


def print_averages(found: xr.Dataset, title: str, scores: Sequence[str]) -> None:
    """Print means and spreads over the runs of each group."""
    out = console()
    out.print(title)
    keys = [str(key) for key in found.attrs["by"]]
    rows = []
    for values, at in _groups(found):
        numbers = []
        for score in scores:
            mean, spread = float(at[score]), float(at[f"{score}_spread"])
            error = "" if math.isnan(spread) else f" ±{number_text(spread)}"
            numbers.append(f"{number_text(mean)}{error}")
        rows.append([*map(str, values), str(int(at["num_runs"])), *numbers])
    names = [score.replace("_", " ") for score in scores]
    out.print(table([*keys, "runs", *names], rows, right=[*keys, "runs", *names]))


def write_averages(path: Path, found: xr.Dataset, scores: Sequence[str]) -> None:
    """Write means and spreads over the runs of each group as CSV."""
    columns = [name for score in scores for name in (score, f"{score}_spread")]
    rows = (
        [*values, int(at["num_runs"]), *(float(at[name]) for name in columns)]
        for values, at in _groups(found)
    )
    write_csv(path, [*found.attrs["by"], "num_runs", *columns], rows)


def _groups(found: xr.Dataset) -> Iterable[tuple[list[object], xr.Dataset]]:
    """Yield the values of the keys and the scores of every combination that has runs."""
    keys = [str(key) for key in found.attrs["by"]]
    if not keys:
        yield [], found
        return
    flat = found.stack(row=keys, create_index=False)
    for index in range(flat.sizes["row"]):
        at = flat.isel(row=index)
        if int(at["num_runs"]):
            yield [at[key].item() for key in keys], at


def number_text(value: float) -> str:
    """Write a number with two digits; a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:.2f}"


def write_matrix(path: Path, similarity: xr.DataArray) -> None:
    """Write a CKA map as CSV, with the layers as first row and column, or a row per pair.

    A row per pair holds all that is known of it, as do maps of groups of runs.
    """
    extra = [str(name) for name in similarity.coords if name not in similarity.dims]
    if similarity.ndim > 2 or extra:
        _write_pairs_of_layers(path, similarity, extra)
        return
    header = ["layer", *_names(similarity, "other_layer")]
    names = _names(similarity, "layer")
    rows = ([name, *row] for name, row in zip(names, similarity.values.tolist(), strict=True))
    write_csv(path, header, rows)


def _write_pairs_of_layers(path: Path, similarity: xr.DataArray, extra: list[str]) -> None:
    name = str(similarity.name)
    dims = [str(dim) for dim in similarity.dims]
    frame = similarity.to_dataset(name=name).reset_coords(extra).to_dataframe(dim_order=dims)
    columns = [name, *extra]
    rows = (
        [*(index if isinstance(index, tuple) else (index,)), *values]
        for index, values in zip(frame.index, frame[columns].values.tolist(), strict=True)
    )
    write_csv(path, [*dims, *columns], rows)


def write_nc(path: Path, result: xr.DataArray | xr.Dataset) -> None:
    """Write all of a result as netCDF, and say so.

    Raises:
        OSError: If it cannot be written.
    """
    result.to_netcdf(path, engine="h5netcdf")
    console().print(f"wrote {path}", soft_wrap=True)


def print_json(result: xr.DataArray | xr.Dataset) -> None:
    """Print a result as JSON: dimensions, coordinates, values and attributes; null for NaN."""
    typer.echo(json.dumps(_plain(result.to_dict()), indent=1))


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def write_steps(path: Path, found: Mapping[str, xr.Dataset], columns: Sequence[str]) -> None:
    """Write results over the steps as CSV, a row per run and step."""
    rows = (
        [name, step, *(float(result[column].sel(step=step)) for column in columns)]
        for name, result in found.items()
        for step in result["step"].values.tolist()
    )
    write_csv(path, ["run", "step", *columns], rows)


def write_pairs(path: Path, result: xr.Dataset, labels: Sequence[str]) -> None:
    """Write the comparison of every pair of runs as CSV."""
    columns = [str(name) for name in result.data_vars]
    rows = (
        [labels[a], labels[b], *(float(result[column][a, b]) for column in columns)]
        for a in range(len(labels))
        for b in range(a + 1, len(labels))
    )
    write_csv(path, ["run", "other_run", *columns], rows)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table as CSV, and say so.

    Raises:
        OSError: If it cannot be written.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    console().print(f"wrote {path}", soft_wrap=True)


def check_figure(path: Path | None) -> None:
    """Refuse a file whose ending names no picture format, before anything is computed.

    Raises:
        InvalidInputError: If matplotlib cannot write such a file.
    """
    if path is None:
        return
    use_no_window()
    from matplotlib.backend_bases import FigureCanvasBase

    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in formats:
        raise InvalidInputError(
            f"`--figure` (={path}) must end in a picture format: {', '.join(formats)}"
        )


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure in the format its ending names, and say so.

    Raises:
        OSError: If it cannot be written.
    """
    figure.savefig(path, dpi=200, bbox_inches="tight")
    console().print(f"wrote {path}", soft_wrap=True)


def _print_thinned(num_steps: Sequence[int], limit: int) -> None:
    if max(num_steps) > limit:
        steps = plural(max(num_steps), "step")
        console().print(f"{limit} of {steps} shown; --csv FILE has all.")


def _names(similarity: xr.DataArray, dim: str) -> list[str]:
    return [str(name) for name in similarity[dim].values.tolist()]
