"""What answers the page: a model, a gallery that may change while the page is open, and pictures to search by."""

import hashlib
import secrets
import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image

from cots.data.image_io import open_image
from cots.errors import CotsError, GalleryError
from cots.model.retrieval_model import RetrievalModel
from index.gallery import Gallery, open_gallery
from index.search import Hit, Searcher, SearchResult

PICTURE_SIDE = 1024
PICTURES_KEPT = 64


@dataclass(frozen=True)
class Shelf:
    """One version of the gallery, ready to be searched and leafed through.

    Attributes:
        searcher: answers queries.
        mark: tells this version of this gallery from all others.
        images, videos: number of items of each kind.
        sources: the names of the items' sources, sorted; empty names left out.
        captioned: whether any item has a caption.
        order: (N,) positions in the snapshot, one an item, mixed so that every source and kind comes up early.
        order_sources: (N,) the source of each, for filters.
    """

    searcher: Searcher
    mark: str
    images: int
    videos: int
    sources: tuple[str, ...]
    captioned: bool
    order: np.ndarray
    order_sources: np.ndarray

    @property
    def items(self) -> int:
        return self.images + self.videos

    @classmethod
    def of(cls, gallery: Gallery, model: RetrievalModel) -> "Shelf":
        searcher = Searcher(gallery, model)
        snapshot = gallery.snapshot
        first = np.unique(snapshot.items, return_index=True)[1]
        videos = snapshot.videos[first]
        sources = snapshot.rows["source"].take(first)
        encoded = pc.dictionary_encode(sources).combine_chunks()
        groups = 2 * encoded.indices.to_numpy() + videos
        # A video is shown by its first moment, which follows its pooled row.
        behind = np.append(first[1:], len(snapshot))
        order = _mixed(groups)
        return cls(
            searcher=searcher,
            mark=_identity(gallery, snapshot.version),
            images=int((~videos).sum()),
            videos=int(videos.sum()),
            sources=tuple(sorted(name for name in encoded.dictionary.to_pylist() if name)),
            captioned=bool(pc.any(pc.greater(pc.binary_length(snapshot.rows["caption"]), 0)).as_py()),
            order=np.minimum(first + videos, behind - 1)[order],
            order_sources=np.asarray(sources.to_numpy(), dtype=object)[order],
        )

    def sample(self, kind: str, source: str, skip: int, count: int) -> list[Hit]:
        """Items in the mixed order, without scores; the same call gives the same items."""
        chosen = np.ones(len(self.order), bool)
        if kind:
            chosen &= self.searcher.snapshot.videos[self.order] == (kind == "video")
        if source:
            chosen &= self.order_sources == source
        positions = self.order[chosen][skip : skip + count]
        return [self._hit(rank, int(position)) for rank, position in enumerate(positions, start=skip + 1)]

    def _hit(self, rank: int, position: int) -> Hit:
        return Hit.of_row(self.searcher.snapshot.row(position), self.searcher.gallery, rank, score=0.0)


class Engine:
    """Searches one gallery with one model, and follows the gallery when it is built, brought up to date or removed.

    Args:
        gallery: directory of the gallery; it need not exist yet.
        model: encodes the queries.
    """

    def __init__(self, gallery: Path, model: RetrievalModel) -> None:
        self.gallery = gallery
        self.model = model
        self._shelf: Shelf | None = None
        self._opening = threading.Lock()
        self._encoding = threading.Lock()
        self._pictures: OrderedDict[str, Image.Image] = OrderedDict()

    @property
    def shelf(self) -> Shelf:
        """The gallery's latest version.

        Raises:
            GalleryError: it is missing, empty, damaged or built by another model.
        """
        with self._opening:
            gallery = open_gallery(self.gallery)
            if self._shelf is None or _identity(gallery, gallery.version) != self._shelf.mark:
                self._shelf = None
                if not len(gallery.snapshot):
                    raise GalleryError(
                        f"The gallery {self.gallery} is empty; "
                        f"add to it with: cots index build SOURCE --gallery {self.gallery}"
                    )
                self._shelf = Shelf.of(gallery, self.model)
            return self._shelf

    def warm_up(self) -> None:
        """Spend now what the first queries would wait for: the model's first run on words and on a picture, and the
        loading of SQL filters.

        The last two take seconds each, and do so in the background.
        """
        with self._encoding:
            self.model.encode_texts(["a photo"])

        def load_the_rest() -> None:
            side = self.model.image_size
            self.model.encode_images(torch.zeros(1, 3, side, side, dtype=torch.uint8))  # unlocked: words go first
            with suppress(CotsError):  # whoever filters gets the sentence
                self.shelf.searcher.gallery.ids("id < 0")

        threading.Thread(target=load_the_rest).start()  # which Ctrl-C waits for: torch aborts if it is cut off

    def search(
        self,
        text: str = "",
        image: Image.Image | None = None,
        without: str = "",
        kind: str = "",
        source: str = "",
        like: int | None = None,
        k: int = 10,
        mode: str = "vector",
    ) -> SearchResult:
        """Search; empty strings mean "any". See `Searcher.search` for what can be asked and what goes wrong."""
        if not (text.strip() or image is not None or like is not None):
            raise CotsError("Type a few words, or drop in a picture, to search.")
        where = "source = '{}'".format(source.replace("'", "''")) if source else None
        searcher = self.shelf.searcher
        with self._encoding:  # two at a time would only share the same cores, and a tokenizer serves one thread
            return searcher.search(
                text, image=image, without=without, where=where, kind=kind or None, like=like, k=k, mode=mode
            )

    def keep_picture(self, content: bytes) -> str:
        """Decode a picture that somebody searches by, hold it in memory and name it; the oldest is forgotten.

        Raises:
            MediaError: it cannot be read.
        """
        picture = open_image(content, target_size=PICTURE_SIDE)
        picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        token = secrets.token_urlsafe(12)
        self._pictures[token] = picture
        while len(self._pictures) > PICTURES_KEPT:
            self._pictures.popitem(last=False)
        return token

    def picture(self, token: str) -> Image.Image:
        """A picture that was kept.

        Raises:
            CotsError: it has been forgotten, or the server was started anew.
        """
        picture = self._pictures.get(token)
        if picture is None:
            raise CotsError("The picture of this search is no longer held; drop it in again.")
        return picture


def _identity(gallery: Gallery, version: int) -> str:
    """Tells this version of this gallery from all others, also from another one built in its place."""
    return hashlib.sha256(repr((gallery.directory, gallery.manifest.created, version)).encode()).hexdigest()[:12]


def _mixed(groups: np.ndarray) -> np.ndarray:
    """(N,) group of each item -> a permutation that takes one of every group in turn, at random within a group.

    The same groups give the same permutation.
    """
    shuffled = np.random.default_rng(3).permutation(len(groups))
    by_group = shuffled[np.argsort(groups[shuffled], kind="stable")]
    ordered = groups[by_group]
    starts = np.searchsorted(ordered, ordered)
    turns = np.arange(len(groups)) - starts
    return by_group[np.argsort(turns, kind="stable")]
