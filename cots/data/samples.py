"""Sources of media: files, folders, globs, webdataset shards and tables become one stream of samples.

    for sample in iter_samples(["photos/", "clips/*.mp4", "shard-000000.tar", "list.csv"], on_error=print):
        image = open_image(sample.media(), name=sample.path)

Nothing is decoded here; a header is read to tell an image from a video. What is no media file at all is reported at
once, damage further inside when it is decoded.
"""

import glob
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from cots.data.media_kind import HEADER_BYTES, MEDIA_EXTENSIONS, Kind, sniff
from cots.data.shards import MEMBER_SEPARATOR, Member, group, read_captions, read_span, scan_tar, split_member
from cots.data.tables import TABLE_EXTENSIONS, plain_fields, read_items
from cots.errors import MediaError, SourceError

OnError = Callable[[MediaError], None]

_PIPE = "not a file but a pipe, a socket or a device"


@dataclass(frozen=True)
class Sample:
    """One image or video, not yet decoded.

    Attributes:
        path: absolute; for a shard's member "/dir/shard.tar::member.webp".
        kind: "image" or "video", by content: an animated GIF, WebP or PNG is a video.
        captions: none, one or several.
        source: where it comes from, for people: the folder's name as the user gave it, the shard's file name, the
            table's column `source` or the table's name.
        extra: other columns of a table or other fields of a shard's .json, such as "licence".
        size: bytes.
        mtime: seconds since 1970; a member's is its shard's.
        offset: where a member's bytes start in its shard; None for a plain file.
    """

    path: str
    kind: Kind
    captions: tuple[str, ...] = ()
    source: str = ""
    extra: dict[str, str] = field(default_factory=dict)
    size: int = 0
    mtime: float = 0.0
    offset: int | None = None

    def read_bytes(self) -> bytes:
        """The encoded content.

        Raises:
            MediaError: the file has gone, cannot be read or has become shorter.
        """
        if self.offset is None:
            return read_span(self.path, 0, -1)
        try:
            return read_span(split_member(self.path)[0], self.offset, self.size)
        except MediaError as error:  # which is the shard's
            raise MediaError(self.path, error.reason) from error

    def media(self) -> str | bytes:
        """What `open_image` and `read_frames` take: a plain file's path, else bytes."""
        return self.path if self.offset is None else self.read_bytes()


def iter_samples(sources: Sequence[str | Path], on_error: OnError) -> Iterator[Sample]:
    """The samples of all sources in their order, a folder's sorted by path; each path once.

    A source is an image or video file, a folder (walked, hidden entries skipped, shards in it included), a glob (`**`
    for any depth), a webdataset shard (.tar) or a table (.jsonl, .csv, .tsv, .parquet), whose rows
    of one path are one sample.

    Args:
        sources: as the user wrote them.
        on_error: called for each item that is no readable media file; the rest goes on.

    Raises:
        SourceError: at once, when a source does not exist or a folder holds no media; during iteration, when a table
            lacks its path column, a shard given by name cannot be opened or holds no media, or either is a pipe.
    """
    found = entries(sources, on_error)
    return each_once(sample for entry in found for sample in samples_of(entry, on_error))


def entries(sources: Sequence[str | Path], on_error: OnError) -> Iterator["Entry"]:
    """The files that some sources stand for: `iter_samples` in two steps, of which the second can be shared out.

    Raises:
        SourceError: at once, as `iter_samples`.
    """
    return chain.from_iterable([part for source in sources for part in _resolve(str(source), on_error)])


def each_once(samples: Iterable[Sample]) -> Iterator[Sample]:
    """The first sample of each path."""
    seen: set[str] = set()
    for sample in samples:
        if sample.path not in seen:
            seen.add(sample.path)
            yield sample


@dataclass(frozen=True)
class Entry:
    """A file of any accepted form. `named`: the user gave its very name, not a folder or a glob."""

    path: str
    source: str
    named: bool


def _resolve(source: str, on_error: OnError) -> list[Iterator[Entry]]:
    """Check that a source exists and give the entries that it stands for."""
    if not source:
        raise SourceError('a source is empty; name a file or a folder ("." for the one you are in)')
    path = os.path.abspath(os.path.expanduser(source))
    if os.path.isdir(path):
        return [_walk_checked(path, source, on_error)]
    if os.path.lexists(path):
        return [iter([Entry(path, os.path.basename(os.path.dirname(path)), named=True)])]
    if glob.has_magic(source):
        matches = sorted(glob.glob(os.path.expanduser(source), recursive=True))
        if not matches:
            raise SourceError(
                f"nothing matches {source}; check the pattern, and quote it so that the shell leaves it alone"
            )
        parts = [part for match in matches for part in _matched(match, on_error)]
        if not parts:
            raise SourceError(
                f"none of the {len(matches)} files that match {source} is an image, a video, a shard or a table"
            )
        return parts
    raise SourceError(f"there is no file or folder {source}")


def _matched(match: str, on_error: OnError) -> list[Iterator[Entry]]:
    """What a glob matched: files of the accepted forms and folders; other files are not meant."""
    path = os.path.abspath(match)
    if os.path.isdir(path):
        return [_walk(path, _label(path), on_error)]
    if not _is_candidate(path):
        return []
    return [iter([Entry(path, os.path.basename(os.path.dirname(path)), named=False)])]


def _walk_checked(folder: str, source: str, on_error: OnError) -> Iterator[Entry]:
    if not os.access(folder, os.R_OK | os.X_OK):
        raise SourceError(f"cannot read the folder {source}; check its permissions")
    if next(_walk(folder, "", lambda error: None), None) is None:
        raise SourceError(f"the folder {source} holds no images, videos or .tar shards")
    return _walk(folder, _label(folder), on_error)


def _label(folder: str) -> str:
    return os.path.basename(folder) or folder


def _walk(folder: str, label: str, on_error: OnError) -> Iterator[Entry]:
    """A folder's media and shards, its own before its folders'; links are followed, no folder is entered twice."""
    visited: set[tuple[int, int]] = set()
    pending = [folder]
    while pending:
        current = pending.pop()
        try:
            status = os.stat(current)
            names = sorted(os.listdir(current))
        except OSError as error:
            on_error(MediaError(_printable(current), (error.strerror or str(error)).lower()))
            continue
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        paths = [os.path.join(current, name) for name in names if not name.startswith(".")]
        folders = {path for path in paths if os.path.isdir(path)}
        for path in paths:
            if path not in folders and _is_candidate(path) and _extension(path) not in TABLE_EXTENSIONS:
                yield Entry(path, label, named=False)
        pending += sorted(folders, reverse=True)


def _extension(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()


def holds_many(entry: Entry) -> bool:
    """Whether a file is a shard or a table."""
    extension = _extension(entry.path)
    return extension == "tar" or extension in TABLE_EXTENSIONS


def _is_candidate(path: str) -> bool:
    extension = _extension(path)
    return extension in MEDIA_EXTENSIONS or extension in TABLE_EXTENSIONS or extension == "tar"


def samples_of(entry: Entry, on_error: OnError) -> Iterator[Sample]:
    """The samples of one file; raises during iteration, as `iter_samples`.

    All their texts are Unicode, as whoever stores them needs it: a file whose name is not, in which an old archive may
    have left bytes of another code, is reported; in a caption half a character becomes "?".
    """

    def complain(error: MediaError) -> None:
        on_error(MediaError(_printable(error.path), error.reason))

    for sample in _found_in(entry, complain):
        if not _is_unicode(sample.path):
            complain(MediaError(sample.path, "its name is not in UTF-8; rename it"))
        elif all(map(_is_unicode, (*sample.captions, sample.source, *sample.extra.values()))):
            yield sample
        else:
            yield replace(
                sample,
                captions=tuple(map(_as_unicode, sample.captions)),
                source=_as_unicode(sample.source),
                extra={name: _as_unicode(value) for name, value in sample.extra.items()},
            )


def _is_unicode(text: str) -> bool:
    return text.isascii() or _as_unicode(text) == text


def _as_unicode(text: str) -> str:
    return text.encode(errors="replace").decode()


def _printable(path: str) -> str:
    return path.encode(errors="backslashreplace").decode().replace("\0", "\\x00")


def _found_in(entry: Entry, on_error: OnError) -> Iterator[Sample]:
    extension = _extension(entry.path)
    if holds_many(entry) and not _may_be_read(entry.path):
        if entry.named:
            raise SourceError(f"{entry.path} is {_PIPE}")
        on_error(MediaError(entry.path, _PIPE))
    elif extension == "tar":
        yield from _from_shard(entry, on_error)
    elif extension in TABLE_EXTENSIONS:
        for row in read_items(entry.path, on_error):
            yield from _from_file(row.path, row.captions, row.source, row.extra, row.place, on_error)
    else:
        yield from _from_file(entry.path, (), entry.source, {}, "", on_error)


def _from_file(
    path: str, captions: tuple[str, ...], source: str, extra: dict[str, str], place: str, on_error: OnError
) -> Iterator[Sample]:
    """The sample of a plain file; `place` is the table's line that names it."""
    path = os.path.abspath(path)
    suffix = f" (named in {place})" if place else ""

    def opened() -> BinaryIO:
        return open(path, "rb")

    try:
        if not _may_be_read(path):
            on_error(MediaError(path, _PIPE + suffix))
            return
        with opened() as file:
            status = os.fstat(file.fileno())
            header = file.read(HEADER_BYTES)
        kind = sniff(header, _extension(path), opened)
    except OSError as error:
        on_error(MediaError(path, (error.strerror or str(error)).lower() + suffix))
        return
    except ValueError:  # of a NUL, or half a character
        on_error(MediaError(path, "no file can have this name" + suffix))
        return
    if kind is None:
        on_error(MediaError(path, _not_media(header) + suffix))
        return
    yield Sample(path, kind, captions, source, extra, status.st_size, status.st_mtime)


def _may_be_read(path: str) -> bool:
    """Whether opening it cannot wait for another program; a folder's own error, or that of what has gone, tells more.

    Raises:
        ValueError: no file can have this name.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return True
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def _not_media(header: bytes) -> str:
    return "not an image or a video, whatever its name says" if header else "the file is empty (0 bytes)"


def _from_shard(entry: Entry, on_error: OnError) -> Iterator[Sample]:
    try:
        members, damage = scan_tar(entry.path)
        mtime = os.stat(entry.path).st_mtime
    except SourceError as error:
        if entry.named:
            raise
        on_error(MediaError(entry.path, str(error)))
        return
    except OSError as error:  # it was there a moment ago
        on_error(MediaError(entry.path, (error.strerror or str(error)).lower()))
        return
    if damage is not None:
        on_error(MediaError(entry.path, damage))
    pairs = group(members)
    if damage is None and entry.named and not any(_is_media(part) for parts in pairs.values() for part in parts):
        raise SourceError(f"the shard {entry.path} holds no images or videos")
    for parts in pairs.values():
        yield from _from_pair(entry.path, parts, mtime, on_error)


def _is_media(extension: str) -> bool:
    """Also of a member called "0001.left.jpg", whose webdataset extension is "left.jpg"."""
    return extension.rpartition(".")[2] in MEDIA_EXTENSIONS


def _from_pair(shard: str, parts: dict[str, Member], mtime: float, on_error: OnError) -> Iterator[Sample]:
    media = [(extension, member) for extension, member in parts.items() if _is_media(extension)]
    if not media:
        return
    captions: tuple[str, ...] = ()
    fields: dict[str, Any] = {}
    try:
        texts: dict[str, bytes] = {
            name: read_span(shard, parts[name].offset, parts[name].size) for name in ("json", "txt") if name in parts
        }
        captions, fields = read_captions(texts)
    except MediaError as error:
        on_error(MediaError(f"{shard}{MEMBER_SEPARATOR}{media[0][1].name}", error.reason))
        return
    except ValueError as error:
        on_error(MediaError(f"{shard}{MEMBER_SEPARATOR}{parts['json'].name}", f"not JSON ({error})"))
    if "license" in fields:
        fields.setdefault("licence", fields.pop("license"))
    extra = plain_fields(fields)
    for extension, member in media:
        path = f"{shard}{MEMBER_SEPARATOR}{member.name}"

        def opened(member: Member = member) -> BinaryIO:
            return io.BytesIO(read_span(shard, member.offset, member.size))

        try:
            header = read_span(shard, member.offset, min(member.size, HEADER_BYTES))
            kind = sniff(header, extension.rpartition(".")[2], opened)
        except MediaError as error:
            on_error(MediaError(path, error.reason))
            continue
        if kind is None:
            on_error(MediaError(path, _not_media(header)))
            continue
        yield Sample(path, kind, captions, os.path.basename(shard), extra, member.size, mtime, member.offset)
