"""Which engine answers a gallery's queries: chosen from size, memory and a recall target, made, kept right, replaced.

exact    every vector is compared; no structure
hnsw, ivf, ivfpq    see `index.ann`
auto     the quickest of these that fits in memory; exact, if every hit must be the best

A model on a GPU takes the search of large galleries there: `exact` and `auto` are then answered by `index.exact_gpu`,
which is as quick as what "auto" stands for, if the vectors fit into the GPU's memory.
"""

import logging
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cots.errors import CotsError, GalleryError
from index.ann import HNSW_LINKS, AnnIndex, Effort, Fill, installed_faiss, make_structure
from index.engine_names import ENGINES, ENGINES_IN_WORDS
from index.exact import ExactIndex
from index.gallery import Gallery, open_gallery
from index.lock import writing
from index.manifest import StructureRecord
from index.memory import available_memory
from index.snapshot import FOLDER, Snapshot
from index.structures import BLOCK, STALE_SHARE, UnusableStructure, read_structure, remove_structures, write_structure
from index.tuning import draw_queries, tune

if TYPE_CHECKING:
    import torch

    from cots.model.retrieval_model import RetrievalModel
    from index.exact_gpu import ExactGpuIndex

EXACT_NUMBERS = 50_000_000  # of vectors times dimensions: two cores read so many in 15 ms, a GPU copies them in 30
HNSW_VECTORS = 300_000  # on two cores a graph of more takes minutes to make; cells answer within a millisecond of it
MEMORY_SHARE = 0.5
FEW_NAMED = 100  # ids in a message
QUICK_SECONDS = 30.0  # a structure that was made in less is made again by whoever finds it unusable
log = logging.getLogger("cots")


class SearchEngine(Protocol):
    """What answers: `index.exact.ExactIndex`, `index.exact_gpu.ExactGpuIndex`, `index.ann.AnnIndex`."""

    kind: str

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k best of the allowed rows for each query: scores (Q, K) and ids (Q, K), best first."""


def choose_engine(count: int, dimension: int, memory: int, recall_target: float) -> str:
    """What "auto" stands for.

    Args:
        count, dimension: of the vectors.
        memory: available bytes; a structure may take half of them.
        recall_target: if it is 1, only to compare everything is sure to reach it.
    """
    if count * dimension <= EXACT_NUMBERS or recall_target == 1 or find_spec("faiss") is None:
        return "exact"
    room = MEMORY_SHARE * memory
    if count <= HNSW_VECTORS and count * (2 * dimension + 8 * HNSW_LINKS + 16) <= room:
        return "hnsw"
    return "ivf" if count * (2 * dimension + 16) <= room else "ivfpq"


def open_engine(
    gallery: Gallery, model: "RetrievalModel | None" = None, device: "torch.device | None" = None
) -> SearchEngine:
    """The engine that answers for a gallery's snapshot.

    A structure that is lost, damaged or too old is never used: if it was made in seconds it is made again, else all
    vectors are compared, which gives the same hits later. A warning says so.

    Args:
        gallery: to be searched.
        model: what built it, which embeds the queries to tune with; without it noisy vectors do.
        device: where to search; by default where the model is, and without one on the CPU.
    """
    if device is None and model is not None:
        device = model.device
    record = gallery.manifest.structure
    if record is None or not len(gallery.snapshot):
        return _exact(gallery.snapshot, device)
    if gallery.manifest.requested == "auto":
        try:
            on_gpu = _on_gpu(gallery.snapshot, device)
        except GalleryError as error:  # what the structure was made for
            log.info("%s", error)
        else:
            if on_gpu is not None:
                return on_gpu
    try:
        return read_structure(gallery.directory, record, gallery.snapshot)
    except CotsError as error:  # FAISS is not installed here
        log.warning("%s; until then every vector is compared.", error)
        return _exact(gallery.snapshot, device)
    except UnusableStructure as error:
        problem = f"The search structure of {gallery.directory} cannot be used ({error})"
    gallery.manifest = open_gallery(gallery.directory).manifest
    if gallery.manifest.structure != record:  # somebody has just put another in its place
        return open_engine(gallery, model, device)
    command = f"cots index engine {record.kind} --gallery {gallery.directory}"
    if record.build_seconds > QUICK_SECONDS:
        log.warning("%s; every vector is compared until you make it again: %s", problem, command)
        return _exact(gallery.snapshot, device)
    try:
        with writing(gallery.directory):
            current = open_gallery(gallery.directory)
            made = _make(current, record.kind, current.manifest.recall_target, model)
            engine = read_structure(gallery.directory, made, gallery.snapshot)
    except (GalleryError, UnusableStructure) as error:
        why = str(error).rstrip(".")
        sentence = "%s; every vector is compared, because it cannot be made again just now: %s. Once it can be: %s"
        log.warning(sentence, problem, why, command)
        return _exact(gallery.snapshot, device)
    log.warning("%s; it was made again.", problem)
    return engine


def set_engine(
    gallery_dir: str | Path,
    engine: str,
    *,
    recall_target: float | None = None,
    model: "RetrievalModel | None" = None,
) -> dict[str, Any]:
    """Change what answers a gallery's queries. Nothing is embedded again.

    Args:
        gallery_dir: the gallery.
        engine: one of `ENGINES`.
        recall_target: at 10, above 0 and at most 1; by default what the gallery has.
        model: what built the gallery, to tune with sentences.

    Returns:
        what `index.build.info` says of the engine.

    Raises:
        GalleryError: there is no gallery or no such engine, the target is out of range, or another process is writing.
        MissingDependency: the engine needs FAISS, which is not installed.
    """
    open_gallery(gallery_dir)
    with writing(gallery_dir) as directory:
        gallery = open_gallery(directory)
        renew_engine(gallery, engine, recall_target, model, anew=True)
    return engine_facts(open_gallery(gallery_dir))


def check_engine(engine: str | None, recall_target: float | None) -> None:
    """Refuse what `renew_engine` would, before work is spent.

    Raises:
        GalleryError: there is no such engine, or the target is out of range.
        MissingDependency: the engine needs FAISS, which is not installed.
    """
    if engine is not None and engine not in ENGINES:
        raise GalleryError(f"There is no engine {engine!r}; use {ENGINES_IN_WORDS}.")
    if recall_target is not None and not 0 < recall_target <= 1:
        raise GalleryError(f"The recall target is {recall_target:g}; give a share above 0 and at most 1, such as 0.95.")
    if engine not in (None, "auto", "exact"):
        installed_faiss()


def renew_engine(
    gallery: Gallery,
    engine: str | None = None,
    recall_target: float | None = None,
    model: "RetrievalModel | None" = None,
    anew: bool = False,
    fill: Fill | None = None,
) -> None:
    """Bring the engine up to date with the table. The caller holds the lock and has the latest manifest.

    Args:
        gallery: opened after the last change.
        engine, recall_target: see `set_engine`; None keeps what was asked for before.
        model: see `set_engine`.
        anew: make the structure though one of its kind and target fits.
        fill: see `index.ann.make_structure`.
    """
    check_engine(engine, recall_target)
    manifest = gallery.manifest
    target = manifest.recall_target if recall_target is None else recall_target
    requested = engine or manifest.requested
    snapshot = gallery.snapshot
    kind = requested
    if requested == "auto":
        kind = choose_engine(len(snapshot), gallery.manifest.dimension, available_memory(), target)
    gallery.manifest = replace(manifest, requested=requested, recall_target=target)
    if kind == "exact" or not len(snapshot):
        gallery.manifest = replace(gallery.manifest, engine="exact", structure=None)
        gallery.manifest.write(gallery.directory)
        remove_structures(gallery.directory, keep=None)
    elif anew or target != manifest.recall_target or not _fits(gallery, kind):
        _make(gallery, kind, target, model, fill)
    else:
        gallery.manifest.write(gallery.directory)


def engine_facts(gallery: Gallery) -> dict[str, Any]:
    """What `cots index info` says of the engine; of an exact one only its name and what was asked for."""
    manifest = gallery.manifest
    facts: dict[str, Any] = {"engine": manifest.engine, "requested": manifest.requested}
    record = manifest.structure
    if record is None:
        return facts
    measured = {
        "recall_target": manifest.recall_target,
        "recall": record.recall,
        "recall_queries": record.queries,
        "build_seconds": record.build_seconds,
        "bytes_per_vector": record.bytes_per_vector,
        "latency_ms": record.latency_ms,
        "breadth": record.breadth,
        "proposals": record.proposals,
        "structure_vectors": record.vectors,
        "structure_version": record.version,
    }
    return facts | measured


def _fits(gallery: Gallery, kind: str) -> bool:
    """Whether the structure on disk is of this kind, sound, and near enough to the table."""
    record = gallery.manifest.structure
    if record is None or record.kind != kind:
        return False
    try:
        index = read_structure(gallery.directory, record, gallery.snapshot, mapped=True)
    except UnusableStructure:
        return False
    return len(index.uncovered) <= STALE_SHARE / 2 * len(gallery.snapshot)


def _make(
    gallery: Gallery, kind: str, target: float, model: "RetrievalModel | None", fill: Fill | None = None
) -> StructureRecord:
    """Make, measure and write a structure; then, in one step, have the manifest name it. The caller holds the lock."""
    snapshot = gallery.snapshot
    _require_finite(gallery, snapshot)
    started = time.perf_counter()
    structure = make_structure(kind, snapshot.vectors, fill)
    seconds = time.perf_counter() - started
    # Tuned as if no number of rows were few, because the gallery may grow beyond that.
    index = AnnIndex(structure, kind, Effort(1), snapshot.vectors, snapshot.ids, few_rows=0)
    measured = tune(index, snapshot.vectors, draw_queries(snapshot, model), target)
    file, rows_file = write_structure(gallery.directory, structure, kind, snapshot)
    size = sum((gallery.directory / FOLDER / name).stat().st_size for name in (file, rows_file))
    record = StructureRecord(
        kind=kind,
        file=file,
        rows_file=rows_file,
        version=snapshot.version,
        vectors=len(snapshot),
        breadth=index.effort.breadth,
        proposals=index.effort.proposals,
        recall=measured.recall,
        queries=measured.queries,
        build_seconds=round(seconds, 2),
        bytes_per_vector=round(size / len(snapshot), 1),
        latency_ms=measured.latency_ms,
    )
    gallery.manifest = replace(gallery.manifest, engine=kind, structure=record)
    gallery.manifest.write(gallery.directory)
    remove_structures(gallery.directory, keep=record)
    if measured.recall.get("10", 1.0) < target:
        log.warning(
            "The engine %s finds %.1f %% of the ten best, less than the target of %.1f %%.",
            kind, 100 * measured.recall["10"], 100 * target,
        )  # fmt: skip
    return record


def _require_finite(gallery: Gallery, snapshot: Snapshot) -> None:
    """Refuse vectors that FAISS fails at. Damage alone brings them into a table."""
    wrong: list[int] = []
    for start in range(0, len(snapshot), BLOCK):
        sound = np.isfinite(snapshot.vectors[start : start + BLOCK]).all(axis=1)
        wrong += snapshot.ids[start : start + BLOCK][~sound].tolist()
    if wrong:
        some = ", ".join(str(id) for id in wrong[:FEW_NAMED])
        raise GalleryError(
            f"Of the vectors of the gallery {gallery.directory} {len(wrong)} are damaged (not finite); remove them "
            f"and build again: cots index remove --gallery {gallery.directory} --where 'id IN ({some})'"
        )


def _exact(snapshot: Snapshot, device: "torch.device | None") -> SearchEngine:
    """All vectors, on the GPU if that is where to search and they are many and fit; else on the CPU."""
    try:
        on_gpu = _on_gpu(snapshot, device)
    except GalleryError as error:
        log.warning("%s Meanwhile the CPU searches.", error)
    else:
        if on_gpu is not None:
            return on_gpu
    return ExactIndex(snapshot.vectors, snapshot.ids)


def _on_gpu(snapshot: Snapshot, device: "torch.device | None") -> "ExactGpuIndex | None":
    """All vectors on a GPU, ready to answer; None if the device is none, or they are too few to be worth the copy.

    Raises:
        GalleryError: they do not fit into its memory.
    """
    if device is None or device.type != "cuda" or snapshot.vectors.size <= EXACT_NUMBERS:
        return None
    from index.exact_gpu import ExactGpuIndex

    index = ExactGpuIndex(snapshot.vectors, snapshot.ids, device)
    index.search(np.zeros((1, snapshot.vectors.shape[1]), np.float32), 1)  # compiles, which takes seconds once
    return index
