"""A result as a person reads it: on the terminal and in Markdown. Both are made from the JSON document alone."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from cots.evaluation.bootstrap import Difference
from cots.evaluation.comparison import Comparison
from cots.evaluation.protocols import PROTOCOLS, Protocol
from cots.evaluation.references import RECALLED, SETTINGS, Reference, references

FIGURES = ("R@1", "R@5", "R@10", "MedR", "MeanR", "mAP@10")
_NAMED = 10


def directions_of(document: dict[str, Any]) -> list[str]:
    """["text_to_video", "video_to_text"], or of images."""
    kind = kind_of(document)
    return [f"text_to_{kind}", f"{kind}_to_text"]


def kind_of(document: dict[str, Any]) -> str:
    """ "image" or "video"."""
    return "video" if "videos" in document else "image"


def spoken(name: str) -> str:
    """A key as words: "text to video"."""
    return name.replace("_", " ")


def headline(document: dict[str, Any]) -> str:
    """ "1,000 videos, 1,000 captions, 12 frames each, model embedded (1d32a0f91c20)"."""
    kind = kind_of(document)
    folds = f" in {document['folds']} folds" if document.get("folds", 1) > 1 else ""
    return (
        f"{document[f'{kind}s']:,} {kind}s{folds}, {document['captions']:,} captions"
        f"{', ' * bool(document['frames'])}{sampling(document)}, model "
        f"{document['model']} ({document['fingerprint'][:12]})"
    )


def sampling(document: dict[str, Any]) -> str:
    """Which frames of each video were embedded; nothing for images."""
    frames, until = document["frames"], document.get("until")
    span = f" of the first {until:g} seconds" if until else ""
    return (f"{frames} frames each" if isinstance(frames, int) else "one frame a second") + span if frames else ""


def lost_items(document: dict[str, Any]) -> list[str]:
    """What to say of items without a vector; nothing if there are none."""
    lost = len(document["decode_failures"])
    return [f"{lost:,} of the {kind_of(document)}s could not be read and count as never found"] if lost else []


def result_rows(document: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Each direction's figures with their 95 % intervals, ready to print."""
    around = document["intervals"]
    rows = []
    for direction in directions_of(document):
        figures = document[direction]
        rows.append((spoken(direction), [_with_interval(figures[f], around[direction][f]) for f in FIGURES]))
    return rows


def normalised_rows(document: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The figures that use the whole test set."""
    return [
        (f"{spoken(direction)}, {spoken(method)}", [f"{figures[f]:.1f}" for f in FIGURES])
        for method, sides in document["normalised"].items()
        if isinstance(sides, dict)
        for direction, figures in sides.items()
    ]


def as_text(document: dict[str, Any]) -> str:
    """The table for a terminal."""
    low, high = document["intervals"]["RSum"]
    return "\n".join(
        [
            f"{document['protocol']}: {headline(document)}",
            *lost_items(document),
            *_aligned([("", list(FIGURES)), *result_rows(document)]),
            f"RSum {document['RSum']:.1f} [{low:.1f}, {high:.1f}]",
            f"in brackets: 95 % intervals, {document['intervals']['method']}",
            "ranks are pessimistic: ties count against the model",
            "",
            *_aligned([(document["normalised"]["note"] + ":", list(FIGURES)), *normalised_rows(document)]),
            "",
            _seconds(document),
        ]
    )


def as_markdown(document: dict[str, Any]) -> str:
    """A page for a repository or an issue."""
    protocol = PROTOCOLS.get(document["protocol"])
    low, high = document["intervals"]["RSum"]
    parts = [
        f"# {protocol.title if protocol else document['protocol']}",
        f"{headline(document)}, {document['date'][:10]}.",
        _markdown_table(["", *FIGURES], [[name, *cells] for name, cells in result_rows(document)]),
        f"RSum {document['RSum']:.1f} [{low:.1f}, {high:.1f}]. In brackets: 95 % intervals, "
        f"{document['intervals']['method']}. Ranks are pessimistic: ties count against the model.",
        f"With scores corrected for hubs, which {document['normalised']['note']}:",
        _markdown_table(["", *FIGURES], [[name, *cells] for name, cells in normalised_rows(document)]),
        _seconds(document) + f" on {document['device']}. " + _versions(document),
    ]
    if failures := document["decode_failures"]:
        items = f"{len(failures)} item{'s' * (len(failures) != 1)}"
        parts += [f"{items} could not be read and count as never found:", _failure_list(failures)]
    parts += [f"Note: {warning}." for warning in document["warnings"]]
    if rows := references(document["protocol"]):
        header = ["model", "setting", "R@1", "R@5", "R@10", "reverse R@1", "source"]
        parts += [f"Published. {SETTINGS}", _markdown_table(header, [_reference_cells(row) for row in rows])]
    return "\n\n".join(parts) + "\n"


def list_protocols(*names: str) -> str:
    """Protocols, by default all, with what they need and what others reported, for a terminal."""
    listed = [PROTOCOLS[name] for name in names or PROTOCOLS]
    sources = list(dict.fromkeys(row.source for protocol in listed for row in references(protocol.name)))
    parts = ["An evaluation file (.jsonl, .csv, .parquet, .tar) needs no protocol: cots evaluate FILE"]
    for protocol in listed:
        lines = [f"{protocol.name}  {protocol.title}", *_needs(protocol)]
        rows = [("", ["R@1", "R@5", "R@10", "reverse", "setting, source"])] if references(protocol.name) else []
        for row in references(protocol.name):
            _, setting, *figures, _ = _reference_cells(row)
            mark = f"[{sources.index(row.source) + 1}]{'' if row.checked else '*'}"
            rows.append((f"  {row.model}", [*figures, f"{setting} {mark}"]))
        parts.append("\n".join([*lines, *_aligned(rows, last_left=True)]))
    if sources:
        parts.append(
            "What others reported: recall in percent, text to image or video; reverse: R@1 of the way back.\n"
            + "\n".join(textwrap.wrap(SETTINGS, 115))
            + f"\n* {RECALLED}: do not quote it from here.\n"
            + "\n".join(f"[{number}] {source}" for number, source in enumerate(sources, 1))
        )
    return "\n\n".join(parts)


def comparison_text(comparison: Comparison) -> str:
    """The table of a paired bootstrap."""
    rows = [("", ["difference", "95 % interval", "p"])]
    for direction, figures in comparison.directions.items():
        rows += [(f"{spoken(direction)} {name}", _difference_cells(one)) for name, one in figures.items()]
    rows.append(("RSum", _difference_cells(comparison.rsum)))
    first, second = comparison.models
    return "\n".join(
        [
            f"{comparison.second}, {second}",
            f"minus {comparison.first}, {first}",
            *_aligned(rows),
            "paired bootstrap over the items; of MedR and MeanR less is better",
            *(f"note: {note}" for note in comparison.notes),
        ]
    )


def _needs(protocol: Protocol) -> list[str]:
    count = f"{protocol.items:,} {protocol.kind}s"
    captions = f", {protocol.captions:,} captions" if protocol.captions else ""
    frames = f", {protocol.frames.count} frames" if protocol.frames.count else ""
    training = " (a training list: verified, not evaluated)" if protocol.is_training else ""
    files = ", ".join(" or ".join(names) for names in protocol.files)
    return [
        f"  {count}{captions}{frames}{training}",
        f"  needs {files} and {protocol.media}",
        f"  {protocol.origin}",
    ]


def _with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


def _difference_cells(one: Difference) -> list[str]:
    low, high = one.interval
    return [f"{one.value:+.2f}", f"[{low:+.2f}, {high:+.2f}]", f"{one.p_value:.3f}"]


def _reference_cells(row: Reference) -> list[str]:
    figures = ["-" if value is None else f"{value:.1f}" for value in (*row.text_to_item, row.item_to_text[0])]
    return [row.model, row.conditions, *figures, row.source if row.checked else f"{row.source}; {RECALLED}"]


def _seconds(document: dict[str, Any]) -> str:
    seconds = document["seconds"]
    work = ", ".join(
        f"{name} {seconds[name]:.1f}" for name in ("decoding", "encoding", "captions", "scoring") if name in seconds
    )
    return f"{seconds['total']:.1f} s; seconds of work, over all threads: {work}"


def _versions(document: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in document["versions"].items()) + "."


def _failure_list(failures: list[dict[str, str]]) -> str:
    lines = [f"- {failure['path']}: {failure['reason']}" for failure in failures[:_NAMED]]
    return "\n".join(lines + ([f"- and {len(failures) - _NAMED} more"] if len(failures) > _NAMED else []))


def _aligned(rows: list[tuple[str, list[str]]], last_left: bool = False) -> Iterable[str]:
    """Rows of a name and cells in columns; cells to the right, the last one to the left if asked."""
    names = max((len(name) for name, cells in rows if cells), default=0)
    columns = max((len(cells) for _, cells in rows), default=0)
    widths = [max(len(cells[place]) for _, cells in rows if len(cells) > place) for place in range(columns)]
    for name, cells in rows:
        line = name.ljust(names)
        for place, cell in enumerate(cells):
            left = last_left and place == columns - 1
            line += "  " + (cell if left else cell.rjust(widths[place]))
        yield line.rstrip()


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
