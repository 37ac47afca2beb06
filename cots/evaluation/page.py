"""The report as one HTML page, made of the JSON document and examples: no script, nothing from outside."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cots.evaluation.examples import Answer, Example
from cots.evaluation.protocols import PROTOCOLS
from cots.evaluation.references import RECALLED, SETTINGS, Reference, references
from cots.evaluation.tables import (
    FIGURES,
    directions_of,
    headline,
    kind_of,
    lost_items,
    normalised_rows,
    sampling,
    spoken,
)

_STYLE = Path(__file__).with_name("report.css")

# The last rank of each bar of the histogram; the last bar takes all beyond.
_BARS = (1, 2, 5, 10, 20, 50, 100, 500)
_BRAND = (
    '<svg viewBox="0 0 34 22" aria-hidden="true"><circle cx="11" cy="11" r="9.5"/><circle cx="23" cy="11" r="9.5"/>'
    '<path d="M17 3.64a9.5 9.5 0 0 1 0 14.72a9.5 9.5 0 0 1 0-14.72z"/></svg>'
)

Examples = tuple[list[Example], list[Example]]
Pictures = Mapping[int, str | None]


def render(document: dict[str, Any], examples: Mapping[str, Examples], pictures: Pictures, names: Sequence[str]) -> str:
    """The page.

    Args:
        document: as `EvaluationResult.to_json`.
        examples: the worst and the best queries of each direction.
        pictures: data: addresses by item; None for one that could not be read.
        names: of the items.
    """
    protocol = PROTOCOLS.get(document["protocol"])
    title = protocol.title if protocol else "/".join(Path(document["protocol"]).parts[-2:])
    directions = directions_of(document)
    by_words = "".join(
        _queries(heading, part, pictures)
        for heading, part in zip(("Furthest off", "Clearest hits"), examples[directions[0]])
    )
    by_item = "".join(
        _item_queries(heading, part, pictures, names)
        for heading, part in zip(("Furthest off", "Clearest hits"), examples[directions[1]])
    )
    parts = [
        f'<div class="pair">{"".join(_direction(document, name) for name in directions)}</div>',
        _rsum(document),
        *(f'<p class="note">{escape(note)}.</p>' for note in (*lost_items(document), *document["warnings"])),
        "<h2>Where the wanted one came</h2>",
        '<p class="hint">Queries by the rank of their best relevant candidate. Blue: within the first ten.</p>',
        f'<div class="pair chart">{"".join(_histogram(document, name) for name in directions)}</div>',
        f"<h2>{spoken(directions[0]).capitalize()}</h2>",
        '<p class="hint">Outlined: relevant. Below a picture: its score.</p>',
        by_words,
        f"<h2>{spoken(directions[1]).capitalize()}</h2>",
        '<p class="hint">Marked: relevant.</p>',
        by_item,
        _normalised(document),
        _published(document),
        _conditions(document),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · COTS</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head>\n"
        "<body><header>"
        f'<div class="brand">{_BRAND}COTS</div><h1>{escape(title)}</h1>'
        f'<p class="lead">{escape(headline(document))}. {escape(document["date"][:10])}.</p></header>\n<main>'
        + "\n".join(part for part in parts if part)
        + "</main></body></html>\n"
    )


def _direction(document: dict[str, Any], name: str) -> str:
    figures, around = document[name], document["intervals"][name]
    recalls = "".join(_recall(f, figures[f], around[f]) for f in FIGURES[:3])
    small = "".join(
        f"<div><b>{figures[f]:.1f}</b>{f} <span>{around[f][0]:.1f} to {around[f][1]:.1f}</span></div>"
        for f in FIGURES[3:]
    )
    return f'<section><h3>{spoken(name).capitalize()}</h3>{recalls}<div class="small">{small}</div></section>'


def _recall(name: str, value: float, around: Sequence[float]) -> str:
    low, high = around
    return (
        f'<div class="recall"><span class="name">{name}</span><span class="track"><span class="fill" '
        f'style="width:{value:.2f}%"></span><span class="whisker" style="left:{low:.2f}%;width:{high - low:.2f}%">'
        f'</span></span><span class="value">{value:.1f}</span><span class="around">{low:.1f} to {high:.1f}</span></div>'
    )


def _rsum(document: dict[str, Any]) -> str:
    low, high = document["intervals"]["RSum"]
    return (
        f'<p class="sum">RSum <b>{document["RSum"]:.1f}</b> {low:.1f} to {high:.1f}</p>'
        f'<p class="hint">Ranges hold 95 % of a {escape(document["intervals"]["method"])}. Ranks are pessimistic: ties '
        "count against the model.</p>"
    )


def _histogram(document: dict[str, Any], name: str) -> str:
    ranks = document["queries"][name]["ranks"]
    ends = [end for end in _BARS if end < max(ranks)] or [1]
    starts = [1, *(end + 1 for end in ends)]
    counts = [sum(start <= rank <= end for rank in ranks) for start, end in zip(starts, [*ends, max(ranks)])]
    labels = [f"{start}" if start == end else f"{start}-{end}" for start, end in zip(starts, ends)]
    labels.append(f"{starts[-1]}+")
    bars = [
        (label, count, start) for label, count, start in zip(labels, counts, starts) if count or start <= max(ranks)
    ]
    width, height, step = 520, 190, 520 / len(bars)
    drawn = []
    for place, (label, count, start) in enumerate(bars):
        tall = (height - 24) * count / max(counts)
        x, middle = place * step, (place + 0.5) * step
        later = "" if start <= 10 else ' class="later"'
        drawn.append(
            f'<rect{later} x="{x + step * 0.12:.1f}" y="{height - tall:.1f}" width="{step * 0.76:.1f}" '
            f'height="{tall:.1f}" rx="2"/><text class="count" x="{middle:.1f}" y="{height - tall - 7:.1f}" '
            f'text-anchor="middle">{count}</text><text x="{middle:.1f}" y="{height + 18}" '
            f'text-anchor="middle">{label}</text>'
        )
    return (
        f'<section><h3>{spoken(name).capitalize()}</h3><svg viewBox="0 0 {width} {height + 26}" role="img" '
        f'aria-label="Ranks, {spoken(name)}"><line x1="0" x2="{width}" y1="{height + 0.5}" y2="{height + 0.5}"/>'
        f"{''.join(drawn)}</svg></section>"
    )


def _rank(example: Example) -> str:
    first = ' class="first"' if example.rank == 1 else ""
    return f'<span class="rank">rank <b{first}>{example.rank:,}</b></span>'


def _picture(item: int, pictures: Pictures, caption: str = "", hit: bool = False, alt: str = "") -> str:
    source = pictures.get(item)
    inside = (
        f'<img class="picture" src="{source}" alt="{escape(alt)}" title="{escape(alt)}">'
        if source
        else f'<span class="picture none" title="{escape(alt)}">no picture</span>'
    )
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    mark = ' class="hit"' if hit else ""
    return f"<figure{mark}>{inside}{below}</figure>"


def _queries(heading: str, examples: list[Example], pictures: Pictures) -> str:
    """Sentences and the pictures that they found."""
    rows = [
        f'<div class="query"><div><p class="words">{escape(example.text)}</p>{_rank(example)}</div>'
        f'<div class="column"><span>wanted</span>{_answer(example.wanted, pictures)}</div>'
        f'<div class="column"><span>came back</span><div class="strip">'
        f"{''.join(_answer(answer, pictures) for answer in example.returned)}</div></div></div>"
        for example in examples
    ]
    return f"<h3>{heading}</h3>{''.join(rows)}" if rows else ""


def _answer(answer: Answer, pictures: Pictures) -> str:
    return _picture(answer.item, pictures, f"{answer.score:.3f}", answer.is_relevant, answer.text)


def _item_queries(heading: str, examples: list[Example], pictures: Pictures, names: Sequence[str]) -> str:
    """Pictures and the sentences that they found."""
    rows = [
        f'<div class="query item">{_picture(example.item, pictures, alt=names[example.item])}<div class="column">'
        f'<span>wanted</span><p class="words">{escape(example.wanted.text)}</p>{_rank(example)}</div>'
        f'<div class="column"><span>came back</span><ol class="captions">'
        + "".join(map(_sentence, example.returned))
        + "</ol></div></div>"
        for example in examples
    ]
    return f"<h3>{heading}</h3>{''.join(rows)}" if rows else ""


def _sentence(answer: Answer) -> str:
    mark = ' class="hit"' if answer.is_relevant else ""
    return f"<li{mark}><span>{answer.score:.3f}</span><span>{escape(answer.text)}</span></li>"


def _table(header: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in header)
    return f'<div class="scroll"><table><tr>{cells}</tr>{"".join(rows)}</table></div>'


def _normalised(document: dict[str, Any]) -> str:
    rows = [
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in normalised_rows(document)
    ]
    return (
        '<h2>With scores corrected for hubs</h2><p class="hint"><span class="mark">'
        f"{document['normalised']['note']}</span> Not comparable with the figures above, nor with any search: "
        "it answers one query at a time.</p>" + _table(["", *FIGURES], rows)
    )


def _published(document: dict[str, Any]) -> str:
    rows = references(document["protocol"])
    if not rows:
        return ""
    forth, back = directions_of(document)
    own = [document[forth][f"R@{k}"] for k in (1, 5, 10)] + [document[back]["R@1"]]
    cells = "".join(f"<td>{value:.1f}</td>" for value in own)
    model = escape(document["model"])
    mine = f'<tr class="own"><td>{model}</td><td></td>{cells}<td class="text source">this report</td></tr>'
    header = ["", "setting", "R@1", "R@5", "R@10", f"{spoken(back)} R@1", "source"]
    return (
        "<h2>Published on this protocol</h2>"
        f'<p class="hint">{SETTINGS}</p>'
        f'<div class="published">{_table(header, [mine, *map(_reference, rows)])}</div>'
    )


def _reference(row: Reference) -> str:
    values = (*row.text_to_item, row.item_to_text[0])
    cells = "".join(f"<td>{'' if value is None else f'{value:.1f}'}</td>" for value in values)
    source = row.source if row.checked else f"{row.source}; {RECALLED}"
    return (
        f"<tr><td>{escape(row.model)}</td><td>{escape(row.conditions)}</td>{cells}"
        f'<td class="text source">{escape(source)}</td></tr>'
    )


def _conditions(document: dict[str, Any]) -> str:
    failures = document["decode_failures"]
    listed = "".join(f"<li>{escape(one['path'])}: {escape(one['reason'])}</li>" for one in failures[:50])
    more = f"<li>and {len(failures) - 50} more</li>" if len(failures) > 50 else ""
    counted = f"{len(failures)}, which count as never found<ul>{listed}{more}</ul>" if failures else "none"
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in document["seconds"].items() if name != "total")
    facts = {
        "Protocol": escape(document["protocol"]),
        "Model": f"{escape(document['model'])}<br><code>{document['fingerprint']}</code>",
        "Input": f"{document['image_size']} px" + (f", {sampling(document)}" if document["frames"] else ""),
        "Could not be read": counted,
        "Time": f"{document['seconds']['total']:.1f} s on {escape(document['device'])}",
        "Work over all threads": f"{seconds} s",
        "Versions": escape(", ".join(f"{name} {version}" for name, version in document["versions"].items())),
        "Queries": f"{kind_of(document)}s and captions <code>{document['queries']['digest'][:16]}</code>",
    }
    return f"<h2>Conditions</h2><dl>{''.join(f'<dt>{name}</dt><dd>{value}</dd>' for name, value in facts.items())}</dl>"
