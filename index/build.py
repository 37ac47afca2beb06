"""Build a gallery or bring it up to date, take items out, and say what it holds. `index.check` checks it."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from cots.bad_files import BadFiles
from cots.data.samples import Sample
from cots.embed import Embedded, Progress, cores, embed
from cots.errors import GalleryError, MediaError
from index.ann import Fill
from index.compaction import tidy
from index.crew import Recipe, embed_with
from index.engine import check_engine, engine_facts, renew_engine
from index.gallery import Gallery, create_gallery, open_gallery
from index.known import Change, KnownItems
from index.listing import list_samples
from index.lock import writing
from index.place import TablePlace
from index.workers import ProcessCrew
from index.writer import TableWriter

if TYPE_CHECKING:
    from cots.model.retrieval_model import RetrievalModel

_ADVICE = (
    "what was embedded before is in the gallery, and the next build goes on from there: mend the files, or allow more "
    "(--max-failures)"
)


@dataclass
class BuildReport:
    """What a build did.

    Attributes:
        added, updated: items embedded, for new files and for changed ones.
        unchanged: items whose files were not read.
        moved: items whose file has another path or time, with the content known.
        relabelled: items whose captions, source or licence changed in the source.
        missing: files of items that are gone but were kept.
        pruned: items removed because their file is gone.
        failed: files that could not be read.
        seconds: for the whole build; embedding_seconds: for the part that embeds.
        items, vectors: what the gallery holds now.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    moved: int = 0
    relabelled: int = 0
    missing: list[str] = field(default_factory=list)
    pruned: int = 0
    failed: list[MediaError] = field(default_factory=list)
    seconds: float = 0.0
    embedding_seconds: float = 0.0
    items: int = 0
    vectors: int = 0

    @property
    def settled(self) -> int:
        """Items of the sources that needed no embedding."""
        return self.unchanged + self.moved + self.relabelled

    @property
    def rate(self) -> float:
        """Items embedded a second."""
        return (self.added + self.updated) / self.embedding_seconds if self.embedding_seconds else 0.0


def build(
    sources: Sequence[str | Path],
    gallery_dir: str | Path,
    model: "RetrievalModel",
    *,
    table: str | Path | None = None,
    prune: bool = False,
    batch_size: int | None = None,
    threads: int | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    max_bad_share: float = 1.0,
    engine: str | None = None,
    recall_target: float | None = None,
    on_error: Callable[[MediaError], None] = lambda error: None,
    progress: Callable[[Progress], None] | None = None,
) -> BuildReport:
    """Create the gallery of some sources, or bring it up to date: only new and changed files are embedded.

    Ctrl-C or a kill loses at most the last seconds' results; the next build goes on from there.

    Args:
        sources: see `cots.data.samples.iter_samples`.
        gallery_dir: the gallery's directory; made if there is none.
        model: must be the one that built the gallery.
        table: the folder, or the address in an object store, that is to hold a new gallery's table, see `index.place`;
            by default the gallery's directory. A gallery that is there knows its own.
        prune: remove the items whose files are gone, from whichever source they came.
        batch_size, progress: see `cots.embed.embed`.
        max_bad_share: the share of the sources' files that may be unreadable. When more are, the build stops; what it
            has embedded stays in the gallery. 1 never stops.
        threads: cores that each process decodes with; by default all are shared out.
        workers: processes that embed, see `index.workers`; by default this one does. On a cluster: actors.
        cluster: address of a Ray cluster that embeds, see `index.cluster`, or "auto"; None: this machine does.
        engine, recall_target: what answers queries, see `index.engine`; None keeps what the gallery has.
        on_error: called with each file that cannot be read; the report lists them too.

    Raises:
        SourceError: a source does not exist or holds no media; or more files are unreadable than `max_bad_share`
            allows.
        GalleryError: another model built the gallery, another process is changing it, it cannot be written to, there
            is no such engine, or its table lies elsewhere, is another's or cannot be reached.
        MissingDependency: the engine needs FAISS, which is not installed.
    """
    check_engine(engine, recall_target)
    _require_directory(gallery_dir)
    if table is not None:
        TablePlace.parse(table)
    started = time.perf_counter()
    failed = BadFiles(max_bad_share, on_error, _ADVICE)
    report = BuildReport(failed=failed.errors)
    alone = workers is None and cluster is None
    stream = list_samples(sources, failed, processes=1 if alone else cores())
    first = list(islice(stream, 1))  # a source that cannot be used says so here, before a gallery is made
    with _cluster(cluster) as ray, writing(gallery_dir) as directory:
        gallery = create_gallery(directory, model, table)
        check_engine(engine or gallery.manifest.requested, None)
        fresh = gallery.table.count_rows() == 0
        known = KnownItems(gallery)
        writer = TableWriter(gallery, _reserve_ids(gallery))
        try:
            wanted = _sort_out(_each_once(chain(first, stream), gallery), known, writer, report, failed)
            failed.of(report.settled + len(wanted) + len(report.failed))
            begun = time.perf_counter()
            items = {sample.path: item for sample, item in wanted}
            samples = [sample for sample, _ in wanted]
            telling = {"on_error": failed, "progress": progress}
            name, device = gallery.manifest.model, str(model.device)
            recipe = Recipe(name, model.fingerprint, device, threads, batch_size, model.bulk)
            with closing(_embedded(samples, model, recipe, workers, ray, **telling)) as embedded:
                for result in embedded:
                    if not result.vectors.any(axis=1).all():
                        reason = f"the model {model.name} gives it a vector of no direction"
                        failed(MediaError(result.sample.path, reason))
                        continue
                    item = items[result.sample.path]
                    writer.put(result, item)
                    report.added += item is None
                    report.updated += item is not None
            report.embedding_seconds = time.perf_counter() - begun
        finally:
            writer.commit()
            gallery.manifest.with_next_id(writer.next_id).write(directory)
        _settle_missing(gallery, known.missing(), prune, report)
        tidy(gallery, fresh)
        gallery = open_gallery(directory)
        renew_engine(gallery, engine, recall_target, model, fill=_fill(ray))
        snapshot = gallery.snapshot
    report.items, report.vectors = int((~snapshot.moments).sum()), len(snapshot)
    report.seconds = time.perf_counter() - started
    return report


def remove(gallery_dir: str | Path, where: str) -> int:
    """Remove the items of which a row meets an SQL condition, with all their rows. Files are left alone.

    Returns:
        The number of items removed.

    Raises:
        GalleryError: there is no gallery, the condition cannot be used, or another process is changing the gallery.
    """
    open_gallery(gallery_dir)
    with writing(gallery_dir) as directory:
        gallery = open_gallery(directory)
        gallery.require_own_table()
        _reserve_ids(gallery)
        snapshot = gallery.snapshot
        items = np.unique(snapshot.items[snapshot.positions(gallery.ids(where))])
        gallery.remove_items(items)
    return len(items)


def info(gallery_dir: str | Path) -> dict[str, Any]:
    """What a gallery holds: the document that `cots index info --json` prints. `version` is the table's.

    Raises:
        GalleryError: there is no gallery, or it cannot be read.
    """
    gallery = open_gallery(gallery_dir)
    snapshot, manifest = gallery.snapshot, gallery.manifest
    videos = int((snapshot.videos & ~snapshot.moments).sum())
    items = int((~snapshot.moments).sum())
    return {
        "items": items,
        "vectors": len(snapshot),
        "images": items - videos,
        "videos": videos,
        "model": manifest.model,
        "fingerprint": manifest.fingerprint,
        "dimension": manifest.dimension,
        "version": snapshot.version,
        "format": manifest.format,
        "dtype": manifest.dtype,
        "created": manifest.created,
        "table": gallery.place.address,
        "sources": sorted(set(snapshot.rows["source"].unique().to_pylist())),
    } | engine_facts(gallery)


def _require_directory(gallery_dir: str | Path) -> None:
    """Refuse an address: the lock, the manifest and what answers queries are files beside the table."""
    if "://" in str(gallery_dir):
        raise GalleryError(
            f"The gallery {gallery_dir} is the address of an object store; give a directory, and name the address "
            f"for its table: --gallery DIR --table {gallery_dir}"
        )


def _reserve_ids(gallery: Gallery) -> int:
    """The first id that no row has had, noted before any row is removed, so that a kill then cannot free an id."""
    ids = gallery.table.search().select(["id"]).to_arrow()["id"]
    next_id = max(gallery.manifest.next_id, (pc.max(ids).as_py() or 0) + 1)
    gallery.manifest.with_next_id(next_id).write(gallery.directory)
    return next_id


def _each_once(samples: Iterable[Sample], gallery: Gallery) -> Iterator[Sample]:
    """The first sample of each path as the table names it: the gallery's own files may be listed by two names."""
    seen: set[str] = set()
    for sample in samples:
        stored = gallery.stored_path(sample.path)
        if stored not in seen:
            seen.add(stored)
            yield sample


def _sort_out(
    samples: Iterable[Sample],
    known: KnownItems,
    writer: TableWriter,
    report: BuildReport,
    failed: Callable[[MediaError], None],
) -> list[tuple[Sample, int | None]]:
    """Settle the samples whose content is known; give those to embed, each with the item that it replaces."""
    wanted: list[tuple[Sample, int | None]] = []
    of_new_path: list[Sample] = []
    for sample in samples:
        try:
            change, item = known.compare(sample)
        except MediaError as error:
            failed(error)
            continue
        if item is None:
            of_new_path.append(sample)
        elif change is Change.CHANGED:
            wanted.append((sample, item))
        else:
            report.unchanged += change is Change.UNCHANGED
            report.moved += change is Change.MOVED
            report.relabelled += change is Change.RELABELLED
            if change is not Change.UNCHANGED:
                writer.relabel(item, sample)
    for sample in of_new_path:
        try:
            item = known.moved_from(sample)
        except MediaError as error:
            failed(error)
            continue
        if item is None:
            wanted.append((sample, None))
        else:
            report.moved += 1
            writer.relabel(item, sample)
    return wanted


def _embedded(
    samples: list[Sample],
    model: "RetrievalModel",
    recipe: Recipe,
    workers: int | None,
    ray: Any,
    **telling: Any,
) -> Generator[Embedded, None, None]:
    """Embed in this process or by a crew, which loads the model by the name that the manifest has for it."""
    if not samples or (workers is None and ray is None):
        yield from embed(
            samples, model, batch_size=recipe.batch_size, workers=recipe.threads, total=len(samples), **telling
        )
    elif ray is None:
        yield from embed_with(ProcessCrew(min(workers or 1, len(samples)), recipe), samples, **telling)
    else:
        from index.cluster import RayCrew

        yield from embed_with(RayCrew(ray, workers, len(samples), recipe), samples, **telling)


def _cluster(address: str | None) -> AbstractContextManager[Any]:
    """Ray's module, connected to a cluster while the body runs; None without an address."""
    if address is None:
        return nullcontext()
    from index.cluster import connection

    return connection(address)


def _fill(ray: Any) -> Fill | None:
    """What fills the cells of a search structure on a cluster, if there is one."""
    if ray is None:
        return None
    from index.filling import cluster_fill

    return cluster_fill(ray)


def _settle_missing(gallery: Gallery, missing: list[tuple[int, str]], prune: bool, report: BuildReport) -> None:
    """Remove the items whose files are gone, or only say so."""
    if prune:
        gallery.remove_items([item for item, _ in missing])
        report.pruned = len(missing)
    else:
        report.missing = [gallery.absolute_path(path) for _, path in missing]
