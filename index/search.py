"""Search: a query becomes one vector, the vector meets all rows, and each item is reported once, at its best moment."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from cots.data.image_io import to_rgb
from cots.errors import GalleryError
from cots.single_core import single_core_threads
from index.captions import find_captions, fuse
from index.engine import open_engine
from index.gallery import Gallery

if TYPE_CHECKING:
    from cots.model.retrieval_model import RetrievalModel

NEGATIVE_WEIGHT = 0.5
KINDS = ("image", "video")
MODES = ("vector", "text", "hybrid")
FUSED = 100  # items of each ranking that are fused, at least
FILTERS = 4  # whose rows are kept for the next query, as long as nobody writes


@dataclass(frozen=True)
class Hit:
    """An item that was found.

    Attributes:
        rank: from 1.
        score: cosine between the query and the item's best vector; in a search of captions their BM25 score, in a
            hybrid search the sum of reciprocal ranks.
        path: where the file lies, absolute; "SHARD.tar::MEMBER" for a member of a shard.
        kind: "image" or "video".
        caption: the item's captions, joined; may be empty.
        start, end: seconds of a video's best moment; None for an image.
        frame: seconds of the frame that stands for this moment; None for an image.
        id: the row of the best vector that a moment or image has, for `Gallery.media` and `like`.
        source, licence: as the gallery's source said; may be empty.
    """

    rank: int
    score: float
    path: str
    kind: str
    caption: str
    start: float | None
    end: float | None
    frame: float | None
    id: int
    source: str
    licence: str

    @classmethod
    def of_row(cls, row: dict[str, Any], gallery: Gallery, rank: int, score: float) -> "Hit":
        """The hit that a row of the gallery's table makes."""
        return cls(
            rank=rank,
            score=score,
            path=gallery.absolute_path(row["path"]),
            kind=row["kind"],
            caption=row["caption"],
            start=row["start"],
            end=row["end"],
            frame=row["frame_time"],
            id=row["id"],
            source=row["source"],
            licence=row["licence"],
        )


@dataclass
class SearchResult:
    """What a query found.

    Attributes:
        query: the text, or "" for a search without one.
        model: name of the model that encoded it.
        took_ms: milliseconds of "encode", "search" and "fetch".
        hits: best first; fewer than asked for only if no more items match.
    """

    query: str
    model: str
    took_ms: dict[str, float] = field(default_factory=dict)
    hits: list[Hit] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The document that `cots search --json` prints."""
        return asdict(self)

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.took_ms[part] = round(1000 * (time.perf_counter() - started), 3)


class Searcher:
    """A gallery and its model, ready to answer.

    Raises:
        GalleryError: the gallery was built by another model.
    """

    def __init__(self, gallery: Gallery, model: "RetrievalModel") -> None:
        gallery.require(model)
        self.gallery = gallery
        self.model = model
        self.snapshot = gallery.snapshot
        self.index = open_engine(gallery, model)
        self._sentences = single_core_threads(1, "sentences")
        # Of no method of its own, which would keep the searcher and its vectors until the garbage collector comes.
        self._filter = lru_cache(FILTERS)(partial(_filtered_rows, gallery))

    def search(
        self,
        text: str | None = None,
        *,
        image: Image.Image | None = None,
        without: str | None = None,
        like: int | None = None,
        where: str | None = None,
        kind: str | None = None,
        k: int = 10,
        mode: str = "vector",
    ) -> SearchResult:
        """Find the k items nearest to a query.

        Args:
            text: what the item should show.
            image: a picture of any mode that it should resemble. Of several wishes the normalised sum is taken.
            without: what it should not show: half its vector is subtracted from the wishes.
            like: id of a row that it should resemble; that row's item is not among the hits.
            where: an SQL condition on the table's columns.
            kind: "image" or "video" only.
            k: number of items.
            mode: "vector" compares what the items show; "text" finds the text's words in captions, so that items
                without them are no hits; "hybrid" ranks both ways and fuses the rankings.

        Raises:
            GalleryError: there is no wish, k is below 1, the kind, mode or id is unknown, the image is no picture, the
                condition cannot be used, or captions are asked for and there are none, or no words to find in them.
        """
        if k < 1:
            raise GalleryError(f"k is {k}; ask for at least one hit.")
        result = SearchResult((text or "").strip(), self.model.name)
        without = (without or "").strip()
        _require_mode(mode, result.query, vector_wishes=image is not None or like is not None or bool(without))
        query: np.ndarray | None = None
        if mode != "text":
            with result.timing("encode"):
                query = self._encode(result.query, image, without, like)
        with result.timing("search"):
            allowed = self._allowed(where, kind, like)
            if query is None:
                found = self._best_captions(result.query, k, allowed)
            elif mode == "vector":
                found = self._best_items(query, k, allowed)
            else:
                depth = max(k, FUSED)
                rankings = (self._best_items(query, depth, allowed), self._best_captions(result.query, depth, allowed))
                found = fuse([[item for item, _ in ranking] for ranking in rankings])[:k]
        if query is None:  # of what captions find, only a video's best moment depends on what is shown
            with result.timing("encode"):
                if any(len(self._moments(item, allowed)) > 1 for item, _ in found):
                    query = self._encode(result.query, None, "", None)
        with result.timing("fetch"):
            result.hits = [self._hit(rank, *item, query, allowed) for rank, item in enumerate(found, start=1)]
        return result

    def _encode(self, text: str, image: Image.Image | None, without: str, like: int | None) -> np.ndarray:
        """The wishes as one vector (D,) float32 of unit norm."""
        wishes: list[np.ndarray] = []
        sentences = [sentence for sentence in (text, without) if sentence]
        texts = self._sentences.submit(self.model.encode_texts, sentences).result().numpy()
        if text:
            wishes.append(texts[0])
        if image is not None:
            wishes.append(self.model.encode_images(self.model.transform(_upright(image))[None]).numpy()[0])
        if like is not None:
            self.gallery.row(like)
            wishes.append(self.snapshot.vectors[self.snapshot.positions(np.array([like]))[0]].astype(np.float32))
        if not wishes:
            raise GalleryError("There is nothing to search for; give a text, a picture or the id of a row to be like.")
        query = _unit(np.sum(wishes, axis=0))
        return _unit(query - NEGATIVE_WEIGHT * texts[-1]) if without else query

    def _allowed(self, where: str | None, kind: str | None, like: int | None) -> np.ndarray | None:
        """Which rows may be found: (N,) bool, or None for all."""
        if where is None and kind is None and like is None:
            return None
        if kind is not None and kind not in KINDS:
            raise GalleryError(f"There is no kind {kind!r}; ask for image or video.")
        version = None if where is None else self.gallery.version
        allowed = self._filter(where, kind, version)
        if like is not None:
            allowed = allowed.copy()
            allowed[self.snapshot.rows_of(self.gallery.row(like)["item"])] = False
        return allowed

    def _best_items(self, query: np.ndarray, k: int, allowed: np.ndarray | None) -> list[tuple[int, float]]:
        """The k best items, each with its best row's score. Rows are fetched until they hold k items or run out."""
        fetch = 2 * k
        while True:
            scores, ids = self.index.search(query[None], fetch, allowed)
            found = ids[0][np.isfinite(scores[0])]  # a damaged vector is no hit
            items = self.snapshot.items[self.snapshot.positions(found)]
            distinct, first = np.unique(items, return_index=True)
            if len(distinct) >= k or ids.shape[1] < fetch:
                best = np.sort(first)[:k]
                return [(int(items[row]), float(scores[0, row])) for row in best]
            fetch *= 4

    def _best_captions(self, text: str, k: int, allowed: np.ndarray | None) -> list[tuple[int, float]]:
        """The k items whose captions match best, with their scores. Rows are fetched as in `_best_items`."""
        if not len(self.snapshot):
            return []
        fetch = 4 * k
        while True:
            ids, scores = find_captions(self.gallery, text, fetch)
            positions = self.snapshot.find(ids)  # -1: the captions are those of the table's latest version
            usable = positions >= 0
            if allowed is not None:
                usable &= allowed[positions]
            items, scores = self.snapshot.items[positions[usable]], scores[usable]
            distinct, first = np.unique(items, return_index=True)
            if len(distinct) >= k or len(ids) < fetch:
                return [(int(items[row]), float(scores[row])) for row in np.sort(first)[:k]]
            fetch *= 4

    def _hit(self, rank: int, item: int, score: float, query: np.ndarray | None, allowed: np.ndarray | None) -> Hit:
        """Read an item's row; of a video the best moment that the filter allows."""
        candidates = self._moments(item, allowed)
        best = 0
        if query is not None and len(candidates) > 1:
            best = int(np.argmax(self.snapshot.vectors[candidates].astype(np.float32) @ query))
        return Hit.of_row(self.snapshot.row(int(candidates[best])), self.gallery, rank, score)

    def _moments(self, item: int, allowed: np.ndarray | None) -> np.ndarray:
        """The rows that may stand for an item: of a video the moments that a filter leaves, else what it leaves."""
        rows = self.snapshot.rows_of(item)
        candidates = np.arange(rows.start, rows.stop)
        if len(candidates) > 1 and allowed is not None:
            candidates = candidates[allowed[rows]]
        moments = candidates[self.snapshot.moments[candidates]]
        return moments if len(moments) else candidates


def _filtered_rows(gallery: Gallery, where: str | None, kind: str | None, version: int | None) -> np.ndarray:
    """(N,) bool, read-only: the rows of a kind for which a condition holds as of a version of the table, of which kinds
    need none."""
    snapshot = gallery.snapshot
    rows = np.ones(len(snapshot), bool)
    if where is not None:
        rows[:] = False
        rows[snapshot.positions(gallery.ids(where))] = True
    if kind is not None:
        rows &= snapshot.videos == (kind == "video")
    rows.flags.writeable = False  # an engine may keep what it makes of it
    return rows


def _require_mode(mode: str, text: str, vector_wishes: bool) -> None:
    if mode not in MODES:
        raise GalleryError(f"There is no mode {mode!r}; search by {', '.join(MODES[:-1])} or {MODES[-1]}.")
    if mode != "vector" and not text:
        raise GalleryError(f"There are no words to find in captions; give a text, or do not ask for the mode {mode}.")
    if mode == "text" and vector_wishes:
        raise GalleryError(
            "Pictures, rows to be like and words to leave out are compared as vectors, which the mode text does not "
            "use; use the mode hybrid."
        )


def _upright(image: Image.Image) -> Image.Image:
    """A picture as the gallery's files are read: turned as its EXIF says, RGB, what is transparent white."""
    if not isinstance(image, Image.Image):
        raise GalleryError(
            f"The image is of the type {type(image).__name__}; give a picture, such as cots.data.image_io.open_image "
            "makes of a file, or PIL.Image.fromarray of an array."
        )
    return to_rgb(ImageOps.exif_transpose(image))


def _unit(vector: np.ndarray) -> np.ndarray:
    """Scale to unit norm.

    Raises:
        GalleryError: it is not finite, or its direction is lost because the wishes cancel out.
    """
    norm = float(np.linalg.norm(vector))
    if not np.isfinite(norm) or norm < 1e-6:
        raise GalleryError(f"The query has no direction (its vector has the norm {norm}); ask for something else.")
    return (vector / norm).astype(np.float32)
