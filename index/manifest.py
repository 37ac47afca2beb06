"""`manifest.json`: what a gallery's vectors mean. Without it they are numbers that no query may be compared with."""

import json
import os
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cots.errors import GalleryError
from index.checksum import checksum

FORMAT = 1
NAME = "manifest.json"
CHECKSUM = "checksum"  # the key of a checksum of all other values
_LATER = (
    "requested",
    "recall_target",
    "structure",
    "table",
    "table_identity",
)  # fields that manifests of format 1 need not have


@dataclass(frozen=True)
class StructureRecord:
    """A search structure on disk: derived from the table, and made again from it when it is lost.

    Attributes:
        kind: "hnsw", "ivf" or "ivfpq".
        file, rows_file: in the gallery's folder `search`; their names end in their checksums.
        version: of the table that it was made from.
        vectors: number of vectors in it.
        breadth, proposals: the tuned effort, see `index.ann.Effort`.
        recall: share of the truly best 1, 10 and 100 rows that are found, by "1", "10" and "100".
        queries: what it was measured with.
        build_seconds: to make it, without tuning.
        bytes_per_vector: of its files.
        latency_ms: of one query for 10 rows, when it was made: "p50" and "p99".
    """

    kind: str
    file: str
    rows_file: str
    version: int
    vectors: int
    breadth: int
    proposals: int
    recall: dict[str, float]
    queries: str
    build_seconds: float
    bytes_per_vector: float
    latency_ms: dict[str, float]


@dataclass(frozen=True)
class Manifest:
    """The model that made the vectors, and how they are kept.

    Attributes:
        model: the name that the model was loaded by; a directory's is absolute.
        fingerprint: hash of the model's weights, transform and tokenizer. A query must come from a model of the same.
        dimension: D of the vectors.
        dtype: type of the stored vectors.
        engine: what answers queries: "exact", "hnsw", "ivf" or "ivfpq".
        requested: the engine that was asked for: one of these, or "auto".
        recall_target: of an approximate engine, at 10, of 1.
        created: ISO 8601, UTC.
        next_id: ids that removed rows have had are below it, so that none is given twice.
        format: version of the gallery's layout.
        structure: the files of an approximate engine, how they were made, and what was measured; None of an exact one.
        table: the folder or the address that holds the table; "" for the gallery's own folder.
        table_identity: what a table that lies elsewhere is marked with, so that no other is taken for it.
    """

    model: str
    fingerprint: str
    dimension: int
    dtype: str = "float16"
    engine: str = "exact"
    requested: str = "auto"
    recall_target: float = 0.95
    created: str = ""
    next_id: int = 0
    format: int = FORMAT
    structure: "StructureRecord | None" = None
    table: str = ""
    table_identity: str = ""

    @classmethod
    def for_model(
        cls, name: str, fingerprint: str, dimension: int, table: str = "", table_identity: str = ""
    ) -> "Manifest":
        """The manifest of a new gallery."""
        created = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(_findable(name), fingerprint, dimension, created=created, table=table, table_identity=table_identity)

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read the manifest of a gallery.

        Raises:
            GalleryError: there is none, it is damaged, or a newer version of COTS wrote it.
        """
        path = directory / NAME
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _no_gallery(directory) from error
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise GalleryError(f"The gallery {directory} cannot be read ({NAME}: {reason}); mend that.") from error
        try:
            values = json.loads(content)
            written = int(values["format"])
        except (ValueError, KeyError, TypeError) as error:
            raise GalleryError(
                f"{path} is damaged ({error}); restore it, or build the gallery again in a new directory."
            ) from error
        if written > FORMAT:
            raise GalleryError(
                f"The gallery {directory} has format {written}, newer than this version reads ({FORMAT}); upgrade cots."
            )
        if values.pop(CHECKSUM, None) not in (None, _checksum(values)):  # format 1 need not have one
            raise GalleryError(
                f"{path} is damaged (its checksum is of other content); restore it, or, if you have changed it on "
                "purpose, take the line of its checksum out."
            )
        try:
            values = {field.name: values[field.name] for field in fields(cls) if field.name not in _LATER} | {
                name: values[name] for name in _LATER if name in values
            }
            if values.get("structure") is not None:
                values["structure"] = StructureRecord(**values["structure"])
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise GalleryError(
                f"{path} is not complete ({error}); restore it, or build the gallery again in a new directory."
            ) from error

    def write(self, directory: Path) -> None:
        """Replace the manifest on disk: after a crash there is the old one or the new one."""
        scratch = directory / f".{NAME}.new"
        with scratch.open("w", encoding="utf-8") as file:
            values = asdict(self)
            json.dump(values | {CHECKSUM: _checksum(values)}, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(directory / NAME)

    def with_next_id(self, next_id: int) -> "Manifest":
        return replace(self, next_id=max(next_id, self.next_id))

    def require(self, model: str, fingerprint: str, directory: Path) -> None:
        """Refuse a model whose vectors cannot be compared with this gallery's.

        Raises:
            GalleryError: the fingerprints differ.
        """
        if fingerprint == self.fingerprint:
            return
        if _findable(model) == self.model:
            raise GalleryError(
                f"The model {model!r} has changed ({fingerprint[:8]}) since it built the gallery {directory} "
                f"({self.fingerprint[:8]}); build it again: cots index build SOURCE --gallery NEW --model {model}"
            )
        ours, theirs = f"{self.model!r} ({self.fingerprint[:8]})", f"{model!r} ({fingerprint[:8]})"
        raise GalleryError(
            f"The gallery {directory} was built by the model {ours}, not by {theirs}; "
            f"use --model {self.model}, or build another gallery: cots index build SOURCE --gallery NEW --model {model}"
        )


def _no_gallery(directory: Path) -> GalleryError:
    if not directory.is_dir():
        return GalleryError(
            f"There is no gallery at {directory}; make one with: cots index build SOURCE --gallery {directory}"
        )
    return GalleryError(
        f"{directory} is not a gallery (it has no {NAME}); make one with: cots index build SOURCE --gallery DIR"
    )


def _findable(model: str) -> str:
    """A model directory is named so that it is found from any working directory."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _checksum(values: dict[str, Any]) -> str:
    return checksum(json.dumps(values, sort_keys=True).encode())
