"""What an evaluation runs on: items with captions, and which captions belong to which items.

read_evaluation_set reads it from a file; `cots.evaluation.protocols` from a dataset's own annotations.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cots.data.frame_sampling import EVERY_SECOND, FrameSampling
from cots.data.media_kind import Kind
from cots.data.samples import Sample, iter_samples
from cots.data.shards import split_member
from cots.data.tables import TABLE_EXTENSIONS, read_items
from cots.errors import EvaluationError, MediaError, SourceError
from cots.evaluation.media_folder import copies_among, some

NO_FILE = "there is no such file"


@dataclass(frozen=True)
class Item:
    """An image or a video.

    Attributes:
        name: what the protocol calls it; a file's path.
        captions: at least one.
        sample: the file; None if it cannot even be opened (`problem` says why).
        label: items of one label are relevant to each other's captions.
        problem: why there is no sample.
    """

    name: str
    captions: tuple[str, ...]
    sample: Sample | None
    label: str
    problem: str = ""


@dataclass(frozen=True)
class EvaluationSet:
    """Attributes:
    protocol: its name; the file's.
    kind: of all items.
    items: in their order.
    frames: which frames of a video are embedded.
    folds: into how many equal parts the items are cut, one after another; each is a gallery of its own.
    warnings: what a reader of the result should know about the data.
    """

    protocol: str
    kind: Kind
    items: tuple[Item, ...]
    frames: FrameSampling = EVERY_SECOND
    folds: int = 1
    warnings: tuple[str, ...] = field(default=())

    @property
    def captions(self) -> list[str]:
        """All captions, item by item."""
        return [caption for item in self.items for caption in item.captions]

    @property
    def owner(self) -> Tensor:
        """(T,) int64: the item of each caption."""
        return torch.tensor([place for place, item in enumerate(self.items) for _ in item.captions])

    @property
    def labels(self) -> Tensor:
        """(C,) int64: equal for items that are relevant to each other's captions, numbered from 0."""
        numbers: dict[str, int] = {}
        return torch.tensor([numbers.setdefault(item.label, len(numbers)) for item in self.items])

    @property
    def digest(self) -> str:
        """SHA-256 of captions, relevance and folds: equal for results that may be compared query by query."""
        content = [[list(item.captions) for item in self.items], self.labels.tolist(), self.folds]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_evaluation_set(file: str | Path) -> EvaluationSet:
    """Read a file of captioned items.

    Args:
        file: a table of `{"image" | "video": path, "captions": [..]}` rows (rows of the same path are joined), or any
            other source whose items have captions, such as a webdataset shard. Items with an equal column or field
            `group` are relevant to each other's captions.

    Raises:
        SourceError: the file cannot be used as a source.
        EvaluationError: the file is of another form, a row is damaged, an item has no caption, or images and videos are
            mixed.
    """
    file = Path(file)
    is_table = file.suffix[1:].lower() in TABLE_EXTENSIONS and file.exists()
    table = _table_rows(file) if is_table else {}
    problems: list[MediaError] = []
    samples = {sample.path: sample for sample in iter_samples([file], problems.append)}
    reasons = {error.path: error.reason for error in problems}
    rows = table or {path: (item.captions, _group(item)) for path, item in samples.items()}
    if problems and not samples and file.is_file() and not is_table and file.suffix.lower() != ".tar":
        raise EvaluationError(
            f"{file} is no list of captioned items; give a .jsonl, .csv, .tsv or .parquet table, or a .tar shard."
        )
    if problems and not is_table:  # captions are known only of what can be read, so the rest cannot count as missed
        raise EvaluationError(
            f"{len(problems)} parts of {file} cannot be used, the first: {problems[0]}; mend it or leave them out."
        )
    items = tuple(
        Item(path, captions, samples.get(path), f"group {group}" if group else path, reasons.get(path, NO_FILE))
        for path, (captions, group) in rows.items()
    )
    silent = [item.name for item in items if not item.captions]
    if silent:
        raise EvaluationError(f"{len(silent)} items of {file} have no caption, the first is {silent[0]}.")
    warnings = _copies(items) if is_table else _mixture(samples)
    return EvaluationSet(str(file), _kind(file, samples), items, warnings=warnings)


def _kind(file: Path, samples: dict[str, Sample]) -> Kind:
    """What all items are; a mixture is an error that names those of the rarer kind."""
    paths: dict[Kind, list[str]] = {}
    for path, sample in samples.items():
        paths.setdefault(sample.kind, []).append(path)
    if not paths:
        raise EvaluationError(f"{file} holds neither images nor videos that can be read.")
    if len(paths) > 1:
        rarer = min(paths, key=lambda kind: len(paths[kind]))
        raise EvaluationError(
            f"{file} holds images and videos; evaluate them apart. By content {len(paths[rarer])} "
            f"of {len(samples)} are {rarer}s: {some(paths[rarer])}."
        )
    return next(iter(paths))


def _mixture(samples: dict[str, Sample]) -> tuple[str, ...]:
    """A warning of the shards that a folder or a glob stands for: perhaps also of those that were trained on."""
    shards = Counter(
        sample.source if sample.offset is None else split_member(sample.path)[0] for sample in samples.values()
    )
    if len(shards) < 2:
        return ()
    named = some(f"{shard} ({count:,})" for shard, count in shards.items())
    return (f"{len(shards)} files are measured as one set of {len(samples):,} items: {named}",)


def _copies(items: tuple[Item, ...]) -> tuple[str, ...]:
    """A warning of files with the same bytes that are not relevant to each other's captions."""
    labels = {item.name: item.label for item in items}
    copies = copies_among({item.name: item.sample for item in items if item.sample})
    apart = [names for names in copies if len({labels[name] for name in names}) > 1]
    if not apart:
        return ()
    named = some(some(names, between=" = ") for names in apart)
    return (f"{len(apart)} times one content stands under several paths, as each other's mistakes: {named}",)


def _group(sample: Sample) -> str:
    return sample.extra.get("group", "")


def _table_rows(file: Path) -> dict[str, tuple[tuple[str, ...], str]]:
    """Captions and group of every path of a table, in its order."""
    rows: dict[str, tuple[tuple[str, ...], str]] = {}
    bad_rows: list[MediaError] = []
    try:
        for row in read_items(file, bad_rows.append):
            rows[row.path] = row.captions, row.extra.get("group", "")
    except SourceError:
        if not bad_rows:  # else the rows say why
            raise
    if bad_rows:
        raise EvaluationError(f"{len(bad_rows)} rows cannot be used, the first: {bad_rows[0]}; mend the file.")
    return rows
