"""The retrieval protocols of the literature: data, splits, counts, frames.

    test_set = open_protocol("msrvtt_1ka", "data/msrvtt")     # verified: every id has exactly one file
    result = measure(test_set, load_model("runs/mine"))

Annotations and media are the user's: no licence at hand lets us ship them (MSR-VTT's captions carry none at all). Each
protocol says where to get them and what the folder must hold; media may lie anywhere below it.
"""

import difflib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from cots.data.frame_sampling import EVERY_SECOND, FrameSampling
from cots.data.media_kind import Kind
from cots.errors import EvaluationError
from cots.evaluation import annotations
from cots.evaluation.annotations import Captions, Reader
from cots.evaluation.evaluation_set import EvaluationSet, Item
from cots.evaluation.media_folder import files_below, find_media, some

_MSRVTT = (
    "captions and lists: msrvtt_data.zip of the releases of github.com/ArrowLuo/CLIP4Clip; videos: MSRVTT.zip of "
    "robots.ox.ac.uk/~maxbain/frozen-in-time"
)
_KARPATHY = "caption_datasets.zip of cs.stanford.edu/people/karpathy/deepimagesent"


@dataclass(frozen=True)
class Protocol:
    """Attributes:
    name, title: what it is called here, and by people.
    kind: of its items.
    items: how many there must be.
    captions: how many there must be; None where no copy was at hand to count them.
    files: the annotation files; of each the names that it goes by.
    read: makes captions by id from them.
    media: where the media lie and what they are called.
    origin: where a person gets the data.
    frames: which frames of a video count, as in the literature (CLIP4Clip's settings).
    folds: into how many galleries the items are cut.
    is_training: a list to train on, which is verified but not evaluated.
    ids_digest: SHA-256 of the sorted ids, one a line; empty where no copy was at hand to compute it from.
    """

    name: str
    title: str
    kind: Kind
    items: int
    captions: int | None
    files: tuple[tuple[str, ...], ...]
    read: Reader
    media: str
    origin: str
    frames: FrameSampling = EVERY_SECOND
    folds: int = 1
    is_training: bool = False
    ids_digest: str = ""


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="flickr30k_1k",
            title="Flickr30K, Karpathy's test split",
            kind="image",
            items=1000,
            captions=5000,
            files=(("dataset_flickr30k.json",),),
            read=annotations.karpathy,
            media="flickr30k-images/NUMBER.jpg",
            origin=f"captions: {_KARPATHY}; images: on request from shannon.cs.illinois.edu/DenotationGraph",
        ),
        Protocol(
            name="coco_5k",
            title="COCO, Karpathy's test split",
            kind="image",
            items=5000,
            captions=25000,
            files=(("dataset_coco.json",),),
            read=annotations.karpathy,
            media="val2014/COCO_val2014_NUMBER.jpg",
            origin=f"captions: {_KARPATHY}; images: val2014.zip of cocodataset.org",
        ),
        Protocol(
            name="coco_1k_5fold",
            title="COCO, the mean of five folds of 1,000 images of Karpathy's test split",
            kind="image",
            items=5000,
            captions=25000,
            files=(("dataset_coco.json",),),
            read=annotations.karpathy,
            media="val2014/COCO_val2014_NUMBER.jpg",
            origin=f"captions: {_KARPATHY}; images: val2014.zip of cocodataset.org",
            folds=5,
        ),
        Protocol(
            name="msrvtt_1ka",
            title="MSR-VTT, 1k-A (JSFusion's list), one caption a video",
            kind="video",
            items=1000,
            captions=1000,
            files=(("MSRVTT_JSFUSION_test.csv",),),
            read=annotations.jsfusion,
            media="videoNUMBER.mp4",
            origin=_MSRVTT,
            frames=FrameSampling(12),
            ids_digest="49a09fb68f7ec52b3b9bbb7e856ffbd3f00233976ed435fded658309c3cd491a",
        ),
        Protocol(
            name="msrvtt_full",
            title="MSR-VTT, the full test split, twenty captions a video",
            kind="video",
            items=2990,
            captions=59800,
            files=(("test_videodatainfo.json", "MSRVTT_data.json"),),
            read=annotations.msrvtt_split,
            media="videoNUMBER.mp4",
            origin=_MSRVTT,
            frames=FrameSampling(12),
            ids_digest=hashlib.sha256("\n".join(f"video{n}" for n in range(7010, 10000)).encode()).hexdigest(),
        ),
        Protocol(
            name="msrvtt_7k",
            title="MSR-VTT, the 7k training list for 1k-A",
            kind="video",
            items=7010,
            captions=140200,
            files=(("MSRVTT_train.7k.csv",), ("MSRVTT_data.json",)),
            read=annotations.msrvtt_train,
            media="videoNUMBER.mp4",
            origin=_MSRVTT,
            frames=FrameSampling(12),
            is_training=True,
            ids_digest="81ea9208d6c64212cd45f7e03774a8c82d45afe7c57efdb3e7d1a630f0b34700",
        ),
        Protocol(
            name="msrvtt_9k",
            title="MSR-VTT, the 9k training list for 1k-A",
            kind="video",
            items=9000,
            captions=180000,
            files=(("MSRVTT_train.9k.csv",), ("MSRVTT_data.json",)),
            read=annotations.msrvtt_train,
            media="videoNUMBER.mp4",
            origin=_MSRVTT,
            frames=FrameSampling(12),
            is_training=True,
            ids_digest="7dce4e3e1af1eded0cb9edbf4a30dc6ad15b9ec201c7a6b4b2860d39280de4d7",
        ),
        Protocol(
            name="msvd",
            title="MSVD, every caption of each test video",
            kind="video",
            items=670,
            captions=None,
            files=(("test_list.txt",), ("raw-captions.pkl", "AllVideoDescriptions.txt")),
            read=annotations.msvd,
            media="ID_START_END.avi",
            origin="videos and AllVideoDescriptions.txt: cs.utexas.edu/users/ml/clamp/videoDescription; lists: "
            "msvd_data.zip of the releases of github.com/ArrowLuo/CLIP4Clip",
            frames=FrameSampling(12),
        ),
        Protocol(
            name="didemo",
            title="DiDeMo, all descriptions of a video as one paragraph, its first 30 seconds",
            kind="video",
            items=1004,
            captions=1004,
            files=(("test_data.json",),),
            read=annotations.didemo,
            media="USER@NUMBER_NUMBER_HASH.mp4, .mov, .avi ...",
            origin="github.com/LisaAnne/LocalizingMoments",
            frames=FrameSampling(64, until=30.0),
        ),
        Protocol(
            name="lsmdc",
            title="LSMDC 2016, the public test of 1,000 clips",
            kind="video",
            items=1000,
            captions=1000,
            files=(("LSMDC16_challenge_1000_publictect.csv",),),
            read=annotations.lsmdc,
            media="FILM/CLIP.avi",
            origin="with permission from sites.google.com/site/describingmovies",
            frames=FrameSampling(12),
        ),
        Protocol(
            name="activitynet",
            title="ActivityNet Captions, val_1, all sentences of a video as one paragraph",
            kind="video",
            items=4917,
            captions=4917,
            files=(("val_1.json",),),
            read=annotations.activitynet,
            media="v_ID.mp4",
            origin="captions: cs.stanford.edu/people/ranjaykrishna/densevid; videos: activity-net.org",
            frames=FrameSampling(64),
        ),
    )
}


def find_protocol(name: str) -> Protocol:
    """The protocol of a name.

    Raises:
        EvaluationError: there is none; the message names those that begin so, or the nearest.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    begun = [protocol for protocol in PROTOCOLS if protocol.startswith(name)]
    near = begun or difflib.get_close_matches(name, PROTOCOLS, n=1)
    hint = f"did you mean {' or '.join(near)}?" if near else "`cots evaluate --list` shows all."
    raise EvaluationError(f"There is no protocol and no file {name}; {hint}")


def is_file_name(name: str) -> bool:
    """Whether a name means a file of items and not a protocol: it exists, or has an extension."""
    return os.path.exists(name) or os.path.splitext(name)[1] != ""


def open_protocol(protocol: str | Protocol, folder: str | Path) -> EvaluationSet:
    """Find a protocol's data in a folder and verify it, before anything is decoded.

    Args:
        protocol: its name, or one of your own.
        folder: holds the annotation files and, anywhere below, the media.

    Raises:
        EvaluationError: an annotation file is missing, of another format or not the list that it should be; or media
            are missing, doubled or of another kind. The message names the first ten and counts the rest.
    """
    protocol = find_protocol(protocol) if isinstance(protocol, str) else protocol
    folder = Path(folder)
    files = [_find_file(folder, names, protocol) for names in protocol.files]
    captions = protocol.read(files)
    _verify_lists(protocol, files, captions)
    found = find_media(list(captions), folder, protocol.kind, protocol.name)
    items = tuple(
        Item(name, tuple(texts), found.samples.get(name), name, found.problems.get(name, ""))
        for name, texts in captions.items()
    )
    return EvaluationSet(protocol.name, protocol.kind, items, protocol.frames, protocol.folds, found.warnings)


def _find_file(folder: Path, names: tuple[str, ...], protocol: Protocol) -> Path:
    """An annotation file by one of its names, in the folder or anywhere below."""
    if not folder.is_dir():
        raise EvaluationError(f"There is no folder {folder}; name the one that holds the data of {protocol.name}.")
    for name in names:
        if (folder / name).is_file():
            return folder / name
        below = [path for path in files_below(folder) if path.name == name]
        if len(below) > 1:
            raise EvaluationError(f"{folder} holds several {name} ({some(map(str, below))}); keep one.")
        if below:
            return below[0]
    raise EvaluationError(
        f"{protocol.name} needs {' or '.join(names)} in {folder} (anywhere below), beside the {protocol.kind}s "
        f"{protocol.media}. Where to get it: {protocol.origin}."
    )


def _verify_lists(protocol: Protocol, files: list[Path], captions: Captions) -> None:
    named = f"{files[0].name} lists"
    if len(captions) != protocol.items:
        raise EvaluationError(
            f"{named} {len(captions):,} {protocol.kind}s, and {protocol.name} has {protocol.items:,}: this is another "
            "list, or a part of it."
        )
    digest = hashlib.sha256("\n".join(sorted(captions)).encode()).hexdigest()
    if protocol.ids_digest and digest != protocol.ids_digest:
        raise EvaluationError(
            f"{named} {len(captions):,} {protocol.kind}s, but not those of {protocol.name}: this is another list."
        )
    silent = [name for name, texts in captions.items() if not any(texts)]
    if silent:
        raise EvaluationError(f"{len(silent)} {protocol.kind}s of {protocol.name} have no caption: {some(silent)}.")
    count = sum(map(len, captions.values()))
    if protocol.captions is not None and count != protocol.captions:
        raise EvaluationError(
            f"{named} {len(captions):,} {protocol.kind}s with {count:,} captions, and {protocol.name} has "
            f"{protocol.captions:,}."
        )
