"""The curves of a run on one page: report.html, whole in itself, for the screen and for paper.

python -m pretrain.report runs/cots_mini                                   # writes runs/cots_mini/report.html
python -m pretrain.report runs/plain runs/filtered --out comparison.html   # several runs, laid over each other
"""

import argparse
import base64
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cots.errors import TrainingError
from cots.evaluation.metrics import recall_sum
from pretrain.charts import Chart, Series
from pretrain.command import exit_code
from pretrain.run_log import QUANTITIES, Quantity, RunLog, figure, read_runs, short_names, words

_DIRECTIONS = {"text_to_image": "text to image", "image_to_text": "image to text"}
_RECALLS = ("R@1", "R@5", "R@10")
_STATIC = Path(__file__).parent / "static"
_COLORS = 8  # --c0 to --c7 in report.css
_NOT_DRAWN = {"step", "epoch", "seconds", "pairs_per_second"}


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{value:.1f}"


def write_report(directories: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of one run or of several, by default into the first run's directory, and return its path.

    Raises:
        OSError: the page cannot be written.
        TrainingError: a directory holds no log.
    """
    runs = read_runs(list(directories))
    path = out or directories[0] / "report.html"
    path.write_text(_page(runs), encoding="utf-8")
    return path


def _page(runs: Sequence[RunLog]) -> str:
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    brand = '<p class="brand">COTS <span>pretraining</span></p>'
    body = "".join(
        [
            f"<header>{brand}<h1>{escape(title)}</h1>{_subtitle(runs)}</header>",
            _tiles(runs[0]) if len(runs) == 1 else _comparison(runs),
            _section("Validation", [*_validation_charts(runs)]),
            *(_section(name, [*_charts(runs, name)]) for name in ("Losses", "Optimisation", "Speed", "Other")),
            _recall_table(runs),
            _reconstructions(runs),
            _settings(runs),
        ]
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} - COTS</title><style>{_read('report.css')}</style>"
        f"<main>{body}</main><script>{_read('report.js')}</script></html>\n"
    )


def _read(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8")


def _subtitle(runs: Sequence[RunLog]) -> str:
    machines = []
    for run in runs:
        if run.starts:
            start = run.starts[-1]
            count = f"{start['ranks']} x " if start["ranks"] > 1 else ""
            machines.append(f"{count}{start['hardware']}, PyTorch {start['torch']}, {start['started'][:10]}")
    return "".join(f"<p>{escape(machine)}</p>" for machine in dict.fromkeys(machines))


def _tiles(run: RunLog) -> str:
    """The figures that a reader looks for first."""
    tiles: list[tuple[str, str, str]] = []
    best = run.best
    if best is not None:
        source, directions = next(iter(best.results.items()))
        place = f"on {short_names(best.results)[source]}"
        for direction, metrics in directions.items():
            if "R@1" in metrics:
                tiles.append((_named(direction).capitalize(), _percent(metrics["R@1"]), f"R@1 {place}"))
            else:
                for name, value in metrics.items():
                    title, unit, factor, *_ = figure(name)
                    if value is not None:
                        tiles.append((title, _format(unit)(factor * value), f"{unit} {place}".lstrip()))
        tiles.append(("Best checkpoint", f"{best.epoch:g}", f"epochs, step {best.step:,}"))
    tiles += [(label, value, note) for label, value, note in _totals(run) if value]
    cells = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{value}</dd><dd>{escape(note)}</dd></div>" for label, value, note in tiles
    )
    return f'<dl class="tiles" style="--wide:{_a_row(len(tiles), 7)};--narrow:{_a_row(len(tiles), 4)}">{cells}</dl>'


def _a_row(count: int, most: int) -> int:
    """How many of `count` tiles stand in a row so that rows are of about one length."""
    rows = math.ceil(count / most)
    return math.ceil(count / rows) if rows else 1


def _totals(run: RunLog) -> list[tuple[str, str, str]]:
    """Label, value ("" where the log does not say) and unit of what a run took."""
    samples = run.steps * run.batch_size if run.batch_size else 0
    on_gpu = bool(run.starts and "CPU" not in run.starts[-1]["hardware"])
    return [
        ("Samples seen", _short(samples) if samples else "", f"{run.batch_of} in {run.steps:,} steps"),
        ("GPU time" if on_gpu else "Computing time", _hours(run.seconds * run.ranks), "all devices together"),
        ("Speed", _median(run, "pairs_per_second_per_gpu", "{:,.0f}"), f"{run.batch_of}/s per device"),
        ("Utilisation", _median(run, "mfu", "{:.0%}"), "of the matrix rate"),
        ("Peak memory", _median(run, "peak_memory_gib", "{:.1f}"), "GiB"),
    ]


def _comparison(runs: Sequence[RunLog]) -> str:
    rows = ""
    for number, run in enumerate(runs):
        best = run.best
        cells = "".join(f"<td>{value or '-'}</td>" for _, value, _ in _totals(run))
        rows += f"<tr>{_run_cell(run, number)}<td>{f'{best.epoch:g}' if best else '-'}</td>{cells}</tr>"
    units = {"Speed": f"{runs[0].batch_of.capitalize()}/s per device", "Peak memory": "Peak GiB"}
    heads = "".join(f"<th>{units.get(label, label)}</th>" for label, *_ in _totals(runs[0]))
    head = f"<thead><tr><th>Run</th><th>Best epoch</th>{heads}</tr></thead>"
    return f'<div class="table"><table>{head}<tbody>{rows}</tbody></table></div>'


def _validation_charts(runs: Sequence[RunLog]) -> Iterator[str]:
    """Of one run R@1, 5 and 10 a source and direction, of several their R@1; of a tokenizer each of its figures."""
    places = dict.fromkeys(
        (source, direction, () if "R@1" in metrics else tuple(metrics))
        for run in runs
        for done in run.validated
        for source, results in done.results.items()
        for direction, metrics in results.items()
    )
    names = short_names(source for source, _, _ in places)
    for source, direction, figures in places:
        where = f"on {names[source]}"
        for name in figures:
            title, unit, factor, from_zero, top = figure(name)
            series = [_validated(run, number, source, direction, name, factor) for number, run in enumerate(runs)]
            if len(runs) == 1:
                series[0].name = ""
            unit_on = f"{unit} {where}".lstrip()
            yield Chart(title, unit_on, series, _x_unit(runs), _format(unit), from_zero, top).svg()
        if figures:
            continue
        title, unit = _named(direction).capitalize(), f"% {where}"
        series = [_validated(run, number, source, direction, "R@1") for number, run in enumerate(runs)]
        if len(runs) == 1:
            series = [_validated(runs[0], 0, source, direction, name) for name in _RECALLS]
            for one, name, share in zip(series, _RECALLS, (100, 66, 42)):
                one.name, one.color = name, f"color-mix(in oklab, var(--c0) {share}%, var(--ground))"
        else:
            unit = f"R@1, {unit}"
        yield Chart(title, unit, series, _x_unit(runs), _percent, from_zero=True).svg()


def _validated(run: RunLog, number: int, source: str, direction: str, name: str, factor: float = 1) -> Series:
    figures = [(done.step, done.results.get(source, {}).get(direction, {}).get(name)) for done in run.validated]
    points = [(_samples(run, step), factor * value) for step, value in figures if value is not None]
    return Series(run.name, points, _color(number))


def _charts(runs: Sequence[RunLog], section: str) -> Iterator[str]:
    known = {name for quantities in QUANTITIES.values() for name in quantities}
    logged = {name for run in runs for row in run.rows for name in row} - _NOT_DRAWN
    if "learning_rate" in logged:
        logged.discard("rate_factor")
    quantities = dict(QUANTITIES.get(section, {}))
    free = sorted(logged - known)
    if section == "Losses":
        quantities |= {
            name: Quantity(words(name[5:]), "loss", from_zero=False) for name in free if name.startswith("loss_")
        }
    if section == "Other":
        quantities = {name: Quantity(words(name), from_zero=False) for name in free if not name.startswith("loss_")}
    for name, (title, unit, factor, from_zero, top) in quantities.items():
        if name not in logged:
            continue
        title = title.replace("Pairs per", f"{runs[0].batch_of.capitalize()} per")
        series = [
            Series(
                run.name if len(runs) > 1 else "",
                [(_samples(run, step), factor * value) for step, value in run.points(name)],
                _color(number),
            )
            for number, run in enumerate(runs)
        ]
        yield Chart(title, unit, series, _x_unit(runs), _format(unit), from_zero, top).svg()


def _section(title: str, charts: Sequence[str]) -> str:
    drawn = "".join(charts)
    return f'<section><h2>{title}</h2><div class="charts">{drawn}</div></section>' if drawn else ""


def _recall_table(runs: Sequence[RunLog]) -> str:
    """Recalls at each run's best checkpoint, source by source; the best run's in bold."""
    best = [(number, run, run.best) for number, run in enumerate(runs)]
    found = [(number, run, done) for number, run, done in best if done is not None]
    metrics = [metrics for _, _, done in found for part in done.results.values() for metrics in part.values()]
    if not found or not all("R@1" in figures for figures in metrics):
        return ""
    directions = list(next(iter(found[0][2].results.values())))
    rows = ""
    for source in dict.fromkeys(source for _, _, done in found for source in done.results):
        lines = [
            (
                f"{_run_cell(run, number) if len(runs) > 1 else ''}<th>{escape(source)}</th>",
                [done.results[source][direction][name] for direction in directions for name in (*_RECALLS, "MedR")]
                + [recall_sum(*done.results[source].values())],
            )
            for number, run, done in found
            if source in done.results
        ]
        columns = [*zip(*(figures for _, figures in lines))]
        # every fourth column is a rank, which is the better the lower it is
        tops = [min(column) if number % 4 == 3 else max(column) for number, column in enumerate(columns)]
        for lead, figures in lines:
            cells = "".join(
                f"<td{' class=top' if figure == top and len(set(column)) > 1 else ''}>{figure:.1f}</td>"
                for figure, top, column in zip(figures, tops, columns)
            )
            rows += f"<tr>{lead}{cells}</tr>"
    above = "".join(f'<th colspan="4">{_named(direction).capitalize()}</th>' for direction in directions)
    heads = "".join(f"<th>{name}</th>" for name in (*_RECALLS, "MedR")) * len(directions)
    lead = '<th>Run</th><th class="left">Source</th>' if len(runs) > 1 else "<th>Source</th>"
    empty = "<th></th>" * (2 if len(runs) > 1 else 1)
    return (
        '<section><h2>At the best checkpoint</h2><div class="table"><table><thead>'
        f"<tr>{empty}{above}<th></th></tr><tr>{lead}{heads}<th>RSum</th></tr>"
        f"</thead><tbody>{rows}</tbody></table></div></section>"
    )


def _reconstructions(runs: Sequence[RunLog]) -> str:
    """What tokenizers keep of validation pictures at their best checkpoint, a sheet a run."""
    sheets = ""
    for number, run in enumerate(runs):
        if path := run.reconstructions:
            name = f'<h3><i style="--s:{_color(number)}"></i>{escape(run.name)}</h3>' if len(runs) > 1 else ""
            source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
            sheets += f'{name}<div class="table"><img src="{source}" alt="Pictures and their reconstructions"></div>'
    title = "<h2>Reconstructions <small>below each row of pictures, at the best checkpoint</small></h2>"
    return f"<section>{title}{sheets}</section>" if sheets else ""


def _settings(runs: Sequence[RunLog]) -> str:
    """Of one run all settings, those that are not the default in ink; of several those in which they differ."""
    flat = [dict(_flat(run.settings)) for run in runs]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    if not names:
        return ""
    if len(runs) == 1:
        defaults = dict(_flat(runs[0].defaults))
        groups: dict[str, str] = {}
        for name in names:
            group, _, own = name.rpartition(".")
            mark = "" if flat[0][name] == defaults.get(name) else ' class="changed"'
            groups[group] = groups.get(group, "") + (
                f"<div{mark}><dt>{escape(own)}</dt><dd>{escape(_plain(flat[0][name]))}</dd></div>"
            )
        lists = "".join(f"<div><h3>{escape(group)}</h3><dl>{items}</dl></div>" for group, items in groups.items())
        title = "<h2>Settings <small>the default ones in grey</small></h2>"
        return f'<section>{title}<div class="settings">{lists}</div></section>'
    rows = ""
    for name in names:
        values = [_plain(settings.get(name)) for settings in flat]
        if len(set(values)) > 1 and name != "training.output":
            rows += f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
    heads = "".join(_run_cell(run, number) for number, run in enumerate(runs))
    return (
        '<section><h2>Settings that differ</h2><div class="table"><table class="wide"><thead>'
        f"<tr><th>Setting</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(part) for part in value) or "-"
    if isinstance(value, dict):
        return " ".join(f"{part}" for name, part in value.items() if (name, part) != ("weight", 1.0)) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value in (None, "") else f"{value:g}" if isinstance(value, float) else str(value)


def _run_cell(run: RunLog, number: int) -> str:
    return f'<th><i style="--s:{_color(number)}"></i>{escape(run.name)}</th>'


def _color(number: int) -> str:
    return f"var(--c{number % _COLORS})"


def _named(direction: str) -> str:
    return _DIRECTIONS.get(direction, direction.replace("_", " "))


def _format(unit: str) -> Callable[[float], str]:
    return _percent if unit[:1] == "%" else _number


def _samples(run: RunLog, step: float) -> float:
    return step * (run.batch_size or 1)


def _x_unit(runs: Sequence[RunLog]) -> str:
    return "samples" if all(run.batch_size for run in runs) else "steps"


def _median(run: RunLog, name: str, form: str) -> str:
    values = [value for _, value in run.points(name)]
    return form.format(statistics.median(values)) if values else ""


def _short(count: float) -> str:
    for limit, suffix in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if count >= limit:
            return f"{count / (1e3 if suffix == ' k' else limit):.3g}{suffix}"
    return f"{count:,.0f}"


def _hours(seconds: float) -> str:
    """Seconds up to two minutes, minutes up to two hours, then hours; "" for 0."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds else ""
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: python -m pretrain.report RUN [RUN ...] [--out FILE]."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, metavar="FILE", help="by default report.html in the first run's directory")
    given = parser.parse_args(arguments)
    try:
        path = write_report(given.runs, given.out)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
        raise TrainingError(f"The report cannot be written ({reason}); give another file with --out.") from error
    print(path)


if __name__ == "__main__":
    sys.exit(exit_code(main))
