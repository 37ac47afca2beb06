"""Small folders laid out as the datasets are distributed."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from cots.evaluation.protocols import PROTOCOLS, Protocol


def write_clip(path: Path, seed: int, seconds: int = 3) -> Path:
    """An mp4 of a frame a second: blocks of colour that differ with the seed."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mov" if path.suffix == ".mov" else None) as container:
        stream = container.add_stream("libx264" if path.suffix != ".avi" else "mpeg4", rate=1)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(seconds):
            blocks = (
                np.random.default_rng([seed, number]).integers(0, 256, (4, 4, 3), np.uint8).repeat(16, 0).repeat(16, 1)
            )
            container.mux(stream.encode(av.VideoFrame.from_ndarray(blocks, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((64, 64), Image.Resampling.NEAREST).save(path)
    return path


def reduced(name: str, items: int, captions: int | None) -> Protocol:
    """A protocol as it is, but for so few items."""
    return replace(PROTOCOLS[name], items=items, captions=captions, ids_digest="")


def msrvtt_1ka(folder: Path, ids: tuple[int, ...] = (7020, 7021, 7022, 7023)) -> Protocol:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"ret{n},msr{i},video{i},a dog number {n} runs" for n, i in enumerate(ids)]
    (folder / "MSRVTT_JSFUSION_test.csv").write_text("key,vid_key,video_id,sentence\n" + "\n".join(rows) + "\n")
    for i in ids:
        write_clip(folder / "videos" / f"video{i}.mp4", i)
    return reduced("msrvtt_1ka", len(ids), len(ids))


def karpathy(folder: Path, name: str) -> Protocol:
    """Four images in the test split, six captions each, and one to train on."""
    file, below = {"flickr30k_1k": ("dataset_flickr30k.json", "flickr30k-images")}.get(
        name, ("dataset_coco.json", "val2014")
    )
    images = []
    for number in range(5):
        write_picture(folder / below / f"{number:04}.jpg", number)
        sentences = [{"raw": f" a cat number {number} sits {word} "} for word in "abcdef"]
        images.append(
            {"filename": f"{number:04}.jpg", "split": "train" if number == 2 else "test", "sentences": sentences}
        )
    (folder / file).write_text(json.dumps({"images": images, "dataset": name}))
    return reduced(name, 4, 20)


def msrvtt_full(folder: Path) -> Protocol:
    videos = [{"video_id": f"video{n}", "split": "test" if n >= 7010 else "train"} for n in (1, 7010, 7011)]
    sentences = [{"video_id": f"video{n}", "caption": f"a {w} of {n}"} for w in ("dog", "cat") for n in (1, 7010, 7011)]
    for n in (1, 7010, 7011):
        write_clip(folder / f"video{n}.mp4", n)
    (folder / "MSRVTT_data.json").write_text(json.dumps({"videos": videos, "sentences": sentences}))
    return reduced("msrvtt_full", 2, 4)


def msrvtt_9k(folder: Path) -> Protocol:
    msrvtt_full(folder)
    (folder / "MSRVTT_train.9k.csv").write_text("video_id\nvideo1\n")
    return reduced("msrvtt_9k", 1, 2)


def msvd(folder: Path, pickled: bool = True) -> Protocol:
    ids = ("aaa_1_10", "bbb_5_9")
    for n, name in enumerate(ids):
        write_clip(folder / "YouTubeClips" / f"{name}.avi", n)
    (folder / "test_list.txt").write_text("\n".join(ids) + "\n")
    if pickled:
        captions = {name: [["a", "dog", "runs"], ["a", "cat"]] for name in (*ids, "other_1_2")}
        (folder / "raw-captions.pkl").write_bytes(pickle.dumps(captions))
    else:
        lines = [f"{name} {caption}" for name in (*ids, "other_1_2") for caption in ("a dog runs", "a cat")]
        (folder / "AllVideoDescriptions.txt").write_text("# a comment\n\n" + "\n".join(lines))
    return reduced("msvd", 2, None)


def didemo(folder: Path) -> Protocol:
    moments = [
        {"video": "1@N0_2_ab.mov", "description": "a dog runs", "times": [[0, 0]]},
        {"video": "3@N0_4_cd.avi", "description": "a cat", "times": [[1, 1]]},
        {"video": "1@N0_2_ab.mov", "description": "then it sits", "times": [[2, 2]]},
    ]
    write_clip(folder / "test" / "1@N0_2_ab.mov", 1, seconds=40)
    write_clip(folder / "test" / "3@N0_4_cd.mp4", 2)  # re-encoded
    (folder / "test_data.json").write_text(json.dumps(moments))
    return reduced("didemo", 2, 2)


def lsmdc(folder: Path) -> Protocol:
    clips = ("1014_2012_00.00.51.926-00.00.54.129", "3015_X_00.01.02.000-00.01.03.000")
    lines = ["\t".join([clip, "a", "b", "c", "d", f"SOMEONE walks {n}."]) for n, clip in enumerate(clips)]
    (folder / "LSMDC16_challenge_1000_publictect.csv").parent.mkdir(parents=True, exist_ok=True)
    (folder / "LSMDC16_challenge_1000_publictect.csv").write_text("\n".join(lines) + "\n")
    for n, clip in enumerate(clips):
        write_clip(folder / clip[:9] / f"{clip}.avi", n)
    return reduced("lsmdc", 2, 2)


def activitynet(folder: Path) -> Protocol:
    entries = {
        f"v_{name}": {"duration": 3.0, "sentences": [" A man runs. ", f" He stops {name}."]} for name in ("x1", "y2")
    }
    write_clip(folder / "v_x1.mp4", 1)
    write_clip(folder / "y2.mp4", 2)  # by its YouTube id
    (folder / "val_1.json").write_text(json.dumps(entries))
    return reduced("activitynet", 2, 2)
