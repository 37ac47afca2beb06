"""Webdataset shards (.tar): where each member's bytes lie, found from the headers alone, and random access to them.

members(path)    the members of one shard, and where the shard breaks off if it does
TarIndex         several shards as one list of pairs, for map-style training data
read_media       the bytes behind a sample's path, file or "shard.tar::member"
read_captions    the captions in a pair's .json or .txt member
"""

import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cots.errors import MediaError, SourceError

MEMBER_SEPARATOR = "::"

_IN_SHARD = re.compile(r"(.*?\.tar)" + MEMBER_SEPARATOR + r"(.+)", re.IGNORECASE | re.DOTALL)
_BLOCK = tarfile.BLOCKSIZE
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
_MOST_DIGITS = 20  # of a size
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar: `size` bytes from `offset` on."""

    name: str
    offset: int
    size: int


def split_member(path: str) -> tuple[str, str]:
    """The shard and the member of "shard.tar::member"; of any other path itself and an empty name."""
    inside = _IN_SHARD.fullmatch(path)
    return (inside[1], inside[2]) if inside else (path, "")


def split_key(name: str) -> tuple[str, str]:
    """Webdataset's rule: "dir/a.b.c" belongs to the pair "dir/a" and is its "b.c" (lower case)."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def scan_tar(path: str | Path) -> tuple[list[Member], str | None]:
    """Read a tar's headers, not its payloads.

    Returns:
        The complete regular members in their order, hidden ones left out, and what is wrong with the rest of the
        archive (None: nothing).

    Raises:
        SourceError: the file cannot be opened or read, or is compressed (no random access).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            start = os.pread(descriptor, 2, 0)
            if start in _COMPRESSED:
                raise SourceError(f"{path} is compressed with {_COMPRESSED[start]}; unpack it to a plain .tar")
            return _scan(descriptor, os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SourceError(f"cannot read the shard {path}: {(error.strerror or str(error)).lower()}") from error


def _scan(descriptor: int, length: int) -> tuple[list[Member], str | None]:
    if length == 0:
        return [], "the file is empty (0 bytes)"
    members: list[Member] = []
    position = 0
    overrides: dict[str, bytes] = {}  # name and size from the GNU or pax records before a member
    while True:
        block = os.pread(descriptor, _BLOCK, position)
        if not block:
            return members, None  # some writers leave the closing zero blocks out
        if len(block) < _BLOCK:
            return members, f"the archive is truncated inside a header, after {len(members)} whole members"
        if block.count(0) == _BLOCK:
            return members, None
        damage = f"the archive is damaged after {len(members)} whole members"
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return members, damage if members else "not a tar archive"
        payload = position + _BLOCK
        size = _number(overrides["size"]) if "size" in overrides else header.size
        if size < 0:
            return members, damage
        position = payload + -(-size // _BLOCK) * _BLOCK
        if payload + size > length:
            return members, f"the archive is truncated inside {header.name!r}, after {len(members)} whole members"
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            try:
                overrides |= _overrides(header.type, os.pread(descriptor, size, payload))
            except ValueError:
                return members, damage
            continue
        name = overrides["path"].decode("utf-8", "surrogateescape") if "path" in overrides else header.name
        overrides = {}
        if header.type in _REGULAR and not _hidden(name):
            members.append(Member(name.removeprefix("./"), payload, size))


def _number(digits: bytes) -> int:
    """-1 for what is no number, or one that no file's size can be."""
    return int(digits) if digits.isdigit() and len(digits) <= _MOST_DIGITS else -1


def _overrides(kind: bytes, payload: bytes) -> dict[str, bytes]:
    """What the records before a member say of it.

    Raises:
        ValueError: they are damaged.
    """
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": payload.rstrip(b"\0")}
    records = dict(_pax_records(payload.rstrip(b"\0")))
    return {key: records[key.encode()] for key in ("path", "size") if key.encode() in records}


def _pax_records(payload: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of records like "18 path=photo.jpg", a line's end behind each and perhaps one in the value.

    Raises:
        ValueError: a record is not as long as it says.
    """
    position = 0
    while position < len(payload):
        digits, space, _ = payload[position : position + _MOST_DIGITS + 1].partition(b" ")
        end = position + _number(digits)
        key, equals, value = payload[position + len(digits) + 1 : end].partition(b"=")
        if not space or not equals or not value.endswith(b"\n") or end > len(payload):
            raise ValueError(f"no pax record at byte {position}")
        yield key, value[:-1]
        position = end


def _hidden(name: str) -> bool:
    """Dot files (macOS writes `._x` beside each x) and webdataset's own `__x__` entries."""
    return name.rpartition("/")[2].startswith((".", "__"))


def group(members: Iterable[Member]) -> dict[str, dict[str, Member]]:
    """Members by pair and extension, in order of first appearance; of two with one name the last, as tar has it."""
    pairs: dict[str, dict[str, Member]] = {}
    for member in members:
        key, extension = split_key(member.name)
        pairs.setdefault(key, {})[extension] = member
    return pairs


class TarIndex:
    """Random access to the pairs of webdataset shards.

    Only headers are read on construction. The index is a few numpy arrays, so it pickles cheaply, and forked loader
    workers share its memory. A read opens and closes its shard: no descriptor is shared between processes, and any
    number of shards will do.

    Args:
        paths: the shards, in the order their pairs are numbered.

    Raises:
        SourceError: a shard is missing, compressed, truncated or damaged; the message names it.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.paths = [os.path.abspath(path) for path in paths]
        codes: dict[str, int] = {}
        keys: list[str] = []
        first: list[int] = [0]
        shard_of: list[np.ndarray] = []
        rows: list[tuple[int, int, int]] = []
        for number, path in enumerate(self.paths):
            members, damage = scan_tar(path)
            if damage is not None:
                raise SourceError(f"cannot use the shard {path}: {damage}; fetch or write it again")
            pairs = group(members)
            keys += pairs
            shard_of.append(np.full(len(pairs), number, np.int32))
            for parts in pairs.values():
                for extension, member in parts.items():
                    rows.append((codes.setdefault(extension, len(codes)), member.offset, member.size))
                first.append(len(rows))
        self.extensions = list(codes)
        # one string, not a list of them: reference counts would unshare a list in forked workers
        self._keys = "".join(keys)
        self._key_ends = np.cumsum([0, *map(len, keys)])
        self._shard_of = np.concatenate(shard_of) if shard_of else np.empty(0, np.int32)
        self._first = np.array(first, np.int64)
        self._rows = np.array(rows, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        """How many pairs there are."""
        return len(self._shard_of)

    def key(self, i: int) -> str:
        """The name of pair `i`; unique within a shard, not between shards."""
        start, end = self._key_ends[i : i + 2].tolist()
        return self._keys[start:end]

    def name(self, i: int) -> str:
        """What messages call pair `i`: "shard.tar::key"."""
        return f"{self.shard(i)}{MEMBER_SEPARATOR}{self.key(i)}"

    def shard(self, i: int) -> str:
        """The path of the shard that pair `i` lies in."""
        return self.paths[self._shard_of[i]]

    def read(self, i: int) -> dict[str, bytes]:
        """The contents of pair `i` by extension, such as {"webp": ..., "json": ...}.

        Raises:
            IndexError: `i` is not in 0 .. len - 1.
            SourceError: the shard has gone, or has become shorter since it was indexed.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"pair {i} of {len(self)}")
        rows = self._rows[self._first[i] : self._first[i + 1]].tolist()
        path = self.shard(i)
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                contents = {self.extensions[code]: os.pread(descriptor, size, offset) for code, offset, size in rows}
            finally:
                os.close(descriptor)
        except OSError as error:
            raise SourceError(f"cannot read the shard {path}: {(error.strerror or str(error)).lower()}") from error
        if any(len(contents[self.extensions[code]]) != size for code, _, size in rows):
            raise SourceError(
                f"the shard {path} has become shorter since it was indexed; start again with the files at rest"
            )
        return contents


def read_media(path: str) -> bytes:
    """The bytes behind a sample's path: a file's, or a member's for "shard.tar::member".

    Raises:
        MediaError: there is no such file or member, or it cannot be read.
    """
    shard, name = split_member(path)
    if not name or os.path.exists(path):
        return read_span(path, 0, -1)
    try:
        stat = os.stat(shard)
        member = _members_by_name(shard, stat.st_size, stat.st_mtime_ns).get(name)
    except OSError as error:
        raise MediaError(path, (error.strerror or str(error)).lower()) from error
    except SourceError as error:
        raise MediaError(path, str(error)) from error
    if member is None:
        raise MediaError(path, "the shard has no such member")
    return read_span(shard, member.offset, member.size)


def read_span(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on; -1: to the end.

    Raises:
        MediaError: the file cannot be read or ends before.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise MediaError(path, (error.strerror or str(error)).lower()) from error
    if size >= 0 and len(content) != size:
        raise MediaError(path, f"ends {size - len(content)} bytes early; it has changed since it was listed")
    return content


@lru_cache(maxsize=16)
def _members_by_name(path: str, size: int, mtime_ns: int) -> dict[str, Member]:
    """The size and time are part of the key, so that a shard written again is scanned again."""
    return {member.name: member for member in scan_tar(path)[0]}


def read_captions(parts: Mapping[str, bytes]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The captions of a pair and its .json's other fields.

    Args:
        parts: contents by extension. A "json" object's "captions" or "caption" is used (a string or a list), else
            "txt", one caption a line.

    Raises:
        ValueError: the JSON does not parse or is not an object.
    """
    fields: dict[str, Any] = {}
    if "json" in parts:
        fields = json.loads(parts["json"])
        if not isinstance(fields, dict):
            raise ValueError(f"the .json holds a {type(fields).__name__}, not an object")
    captions = clean_captions(fields.pop("captions", None)) or clean_captions(fields.pop("caption", None))
    if not captions and "txt" in parts:
        captions = clean_captions(parts["txt"].decode("utf-8", "replace").splitlines())
    return captions, fields


def clean_captions(value: Any) -> tuple[str, ...]:
    """A caption or a list of captions as a tuple of non-empty strings, white space stripped."""
    values = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
    return tuple(stripped for text in values if isinstance(text, str) and (stripped := text.strip()))
