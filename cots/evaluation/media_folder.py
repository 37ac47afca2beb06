"""Finds the media of a protocol in a person's folder, and says what is missing, doubled, extra or mislabelled.

found = find_media(["video7010", "video7020"], "data/msrvtt", "video")
"""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from cots.data.media_kind import IMAGE_EXTENSIONS, MEDIA_EXTENSIONS, VIDEO_EXTENSIONS, Kind
from cots.data.samples import Sample, iter_samples
from cots.errors import EvaluationError, MediaError

NAMED = 10  # so many are named in a message, and the rest counted

_PIECE = 1 << 16


@dataclass(frozen=True)
class FoundMedia:
    """Attributes:
    samples: by id; an id whose file cannot even be opened has none.
    problems: why not, by id.
    warnings: what a reader of the result should know.
    """

    samples: dict[str, Sample]
    problems: dict[str, str]
    warnings: tuple[str, ...]


def find_media(ids: Sequence[str], folder: str | Path, kind: Kind, what: str = "") -> FoundMedia:
    """Find the file of each id anywhere below a folder; extensions do not matter, so re-encoded files are found too.

    Args:
        ids: as the annotations have them.
        folder: the person's data.
        kind: what the files must be, by content.
        what: the protocol, for messages.

    Raises:
        EvaluationError: an id has no file, or several, or one that is of another kind.
    """
    wanted = {_stem(name): name for name in ids}
    by_id: dict[str, list[Path]] = defaultdict(list)
    extra: list[Path] = []
    for path in _media_files(Path(folder), kind):
        # ActivityNet's own files are called v_ID, those fetched by their addresses ID
        name = wanted.get(_stem(path.name)) or wanted.get(f"v_{_stem(path.name)}")
        if name is None:
            extra.append(path)
        else:
            by_id[name].append(path)
    _refuse_missing([name for name in ids if name not in by_id], ids, extra, folder, kind, what)
    doubled = {name: paths for name, paths in by_id.items() if len(paths) > 1}
    if doubled:
        listed = (f"{name} ({', '.join(map(str, paths))})" for name, paths in doubled.items())
        raise EvaluationError(
            f"{len(doubled)} {kind}s of {what} have more than one file: {some(listed)}; keep one of each."
        )
    samples, problems = _open(by_id, kind, what)
    warnings = []
    if extra:
        named = some(str(path.relative_to(folder)) for path in extra)
        warnings.append(f"{len(extra)} {kind} files are no part of {what} and are left out: {named}")
    if copies := copies_among(samples):
        named = some(some(names, between=" = ") for names in copies)
        warnings.append(f"{len(copies)} times {what} has one content under several ids (mislabelled?): {named}")
    return FoundMedia(samples, problems, tuple(warnings))


def files_below(folder: Path) -> Iterator[Path]:
    """A folder's files, its own before its folders', sorted; hidden ones are left out. Links are followed, and no
    folder is entered twice."""
    visited: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def some(names: Iterable[str], between: str = ", ") -> str:
    """The first ten names and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return between.join(names[:NAMED]) + rest


def _media_files(folder: Path, kind: Kind) -> list[Path]:
    """All files below a folder that by their extension can be of a kind, sorted; hidden ones are left out."""
    if not folder.is_dir():
        raise EvaluationError(f"There is no folder {folder}; name the one that holds the data with --data.")
    extensions = VIDEO_EXTENSIONS | {"gif"} if kind == "video" else IMAGE_EXTENSIONS
    return [path for path in files_below(folder) if path.name.rpartition(".")[2].lower() in extensions]


def _stem(name: str) -> str:
    """A name without its extensions of media: "a" of "a", "a.mov" and "a.mov.mp4"; other dots belong to the name."""
    stem, _, extension = name.rpartition(".")
    return _stem(stem) if stem and extension.lower() in MEDIA_EXTENSIONS else name


def _refuse_missing(
    missing: list[str], ids: Sequence[str], extra: list[Path], folder: str | Path, kind: Kind, what: str
) -> None:
    if not missing:
        return
    stems = {_stem(path.name).casefold(): path.name for path in extra}
    hints = []
    for name in missing[:NAMED]:
        numbers = _numbers(_stem(name))
        alike = [stem for stem in stems if numbers <= _numbers(stem)]  # video7010 is not a misspelt video701
        near = get_close_matches(_stem(name).casefold(), alike, n=1, cutoff=0.8)
        hints.append(f"{name} (there is a {stems[near[0]]})" if near else name)
    rest = f" and {len(missing) - NAMED:,} more" if len(missing) > NAMED else ""
    raise EvaluationError(
        f"{len(missing):,} of the {len(ids):,} {kind}s of {what} are not below {folder}: {', '.join(hints)}{rest}. "
        "Figures on a part of them could not be compared with any other; `cots evaluate --list` says where to get them."
    )


def _numbers(name: str) -> set[str]:
    return {number.lstrip("0") for number in re.findall(r"\d+", name)}


def _open(by_id: dict[str, list[Path]], kind: Kind, what: str) -> tuple[dict[str, Sample], dict[str, str]]:
    samples: dict[str, Sample] = {}
    problems: dict[str, str] = {}
    others: list[str] = []
    for name, (path,) in by_id.items():
        errors: list[MediaError] = []
        found = list(iter_samples([path], errors.append))
        if not found:
            problems[name] = errors[0].reason
        elif found[0].kind != kind:
            others.append(f"{path.name} (a{'n' if found[0].kind == 'image' else ''} {found[0].kind})")
        else:
            samples[name] = found[0]
    if others:
        raise EvaluationError(
            f"{len(others)} files of {what} are no {kind}s, whatever their names say: {some(others)}."
        )
    return samples, problems


def copies_among(samples: dict[str, Sample]) -> list[list[str]]:
    """Ids whose files have the same bytes. Only files of one size, and of these only with equal ends, are read."""
    groups: dict[tuple[int, bytes, bytes], list[str]] = defaultdict(list)
    sizes: dict[int, list[str]] = defaultdict(list)
    for name, sample in samples.items():
        sizes[sample.size].append(name)
    for size, names in sizes.items():
        for name in names if len(names) > 1 else ():
            groups[size, *_ends(samples[name].path)].append(name)
    copies: list[list[str]] = []
    for names in groups.values():
        whole: dict[bytes, list[str]] = defaultdict(list)
        for name in names if len(names) > 1 else ():
            with open(samples[name].path, "rb") as file:
                whole[hashlib.file_digest(file, "sha256").digest()].append(name)
        copies += [same for same in whole.values() if len(same) > 1]
    return copies


def _ends(path: str) -> tuple[bytes, bytes]:
    with open(path, "rb") as file:
        first = file.read(_PIECE)
        file.seek(-min(_PIECE, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return first, file.read(_PIECE)
