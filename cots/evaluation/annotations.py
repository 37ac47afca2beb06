"""Readers of the datasets' own annotation files: each gives the ids of a test split and their captions, in order.

A file must be UTF-8. What is not as its format says is an error that names the file and the place.
"""

import codecs
import csv
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cots.errors import EvaluationError

Captions = dict[str, list[str]]
Files = list[Path]

KARPATHY_CAPTIONS = 5  # some images have a sixth or seventh, which the literature leaves out


def karpathy(files: Files) -> Captions:
    """dataset_flickr30k.json, dataset_coco.json: the images of the split "test", by file name."""
    (path,) = files
    document = _json(path)
    with _format(path, "a Karpathy file, {'images': [{'filename', 'split', 'sentences': [{'raw'}]}]}"):
        return {
            image["filename"]: [sentence["raw"].strip() for sentence in image["sentences"][:KARPATHY_CAPTIONS]]
            for image in document["images"]
            if image["split"] == "test"
        }


def jsfusion(files: Files) -> Captions:
    """MSRVTT_JSFUSION_test.csv: one caption of each video."""
    (path,) = files
    return {video: [row["sentence"]] for video, row in _csv_by_video(path, "sentence").items()}


def msrvtt_split(files: Files) -> Captions:
    """test_videodatainfo.json or MSRVTT_data.json: all captions of the videos of the split "test"."""
    (path,) = files
    document = _json(path)
    with _format(path, "an MSR-VTT file, {'videos': [{'video_id', 'split'}], 'sentences': [{'video_id', 'caption'}]}"):
        captions: Captions = {video["video_id"]: [] for video in document["videos"] if video["split"] == "test"}
        for sentence in document["sentences"]:
            if sentence["video_id"] in captions:
                captions[sentence["video_id"]].append(sentence["caption"].strip())
        return captions


def msrvtt_train(files: Files) -> Captions:
    """MSRVTT_train.9k.csv with MSRVTT_data.json: all captions of the listed videos."""
    listed, data = files
    document = _json(data)
    captions: Captions = {video: [] for video in _csv_by_video(listed)}
    with _format(data, "an MSR-VTT file, {'sentences': [{'video_id', 'caption'}]}"):
        for sentence in document["sentences"]:
            if sentence["video_id"] in captions:
                captions[sentence["video_id"]].append(sentence["caption"].strip())
    return captions


def msvd(files: Files) -> Captions:
    """test_list.txt with raw-captions.pkl (lists of words by video) or AllVideoDescriptions.txt ("ID caption")."""
    listed, described = files
    captions: Captions = {line.strip(): [] for line in _text(listed).split("\n") if line.strip()}
    if described.suffix == ".pkl":
        everything = _plain_pickle(described)
        with _format(described, "a pickled {video: [caption as a list of words]}"):
            return {
                video: [" ".join(_as_text(word) for word in words) for words in everything[video]] for video in captions
            }
    for line in _text(described).split("\n"):
        video, _, caption = line.strip().partition(" ")
        if video in captions and caption:
            captions[video].append(caption.strip())
    return captions


def didemo(files: Files) -> Captions:
    """test_data.json: the descriptions of a video's moments, joined to a paragraph."""
    (path,) = files
    captions: Captions = {}
    document = _json(path)
    with _format(path, "a DiDeMo file, [{'video', 'description'}]"):
        for moment in document:
            captions.setdefault(moment["video"], []).append(moment["description"].strip())
    return {video: [" ".join(parts)] for video, parts in captions.items()}


def lsmdc(files: Files) -> Captions:
    """LSMDC16_challenge_1000_publictect.csv: clip, four times, and a sentence a line, between tabs."""
    (path,) = files
    captions: Captions = {}
    for number, line in enumerate(_text(path).split("\n"), 1):
        columns = line.strip().split("\t")
        if columns == [""]:
            continue
        if len(columns) != 6:
            raise EvaluationError(
                f"Line {number} of {path} has {len(columns)} columns between tabs, an LSMDC file has 6."
            )
        captions.setdefault(columns[0], []).append(columns[5].strip())
    return captions


def activitynet(files: Files) -> Captions:
    """val_1.json: the sentences of each video, joined to a paragraph."""
    (path,) = files
    document = _json(path)
    with _format(path, "an ActivityNet Captions file, {video: {'sentences': [..]}}"):
        return {
            video: [" ".join(sentence.strip() for sentence in entry["sentences"])] for video, entry in document.items()
        }


def _csv_by_video(path: Path, *columns: str) -> dict[str, dict[str, str]]:
    """Some columns of a table, of each row by its column video_id."""
    table = csv.DictReader(io.StringIO(_text(path), newline=""))
    needed = ("video_id", *columns)
    with _format(path, "a table with commas between its columns"):
        lacking = [column for column in needed if column not in (table.fieldnames or ())]
        if lacking:
            raise EvaluationError(
                f"{path} has no column {' or '.join(lacking)}; it is not the list that its name says."
            )
        rows = []
        for row in table:
            if short := [column for column in needed if row[column] is None]:
                raise EvaluationError(f"Line {table.line_num} of {path} ends before its column {short[0]}.")
            rows.append({column: row[column].strip() for column in needed})
    by_video = {row["video_id"]: row for row in rows}
    if len(by_video) < len(rows):
        raise EvaluationError(f"{path} lists {len(rows) - len(by_video)} videos twice.")
    return by_video


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        encoding = "utf-16" if error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin1"
        raise EvaluationError(
            f"{path} is not UTF-8 (byte {byte:#04x} at position {error.start}); convert it, for example with "
            f"`iconv -f {encoding} -t utf-8`."
        ) from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise EvaluationError(f"{path} is not JSON: {error}.") from error


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, strings and numbers; a pickle that names a function could run anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only plain lists and words are read")


def _plain_pickle(path: Path) -> Any:
    try:
        return _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise EvaluationError(f"{path} cannot be read as a pickle of captions: {error}.") from error


def _as_text(word: str | bytes) -> str:
    return word.decode("utf-8") if isinstance(word, bytes) else word


class _format:
    """Turns a missing key or a wrong type inside an annotation file into an error that says what was expected."""

    def __init__(self, path: Path, expected: str) -> None:
        self._path = path
        self._expected = expected

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (KeyError, TypeError, AttributeError, ValueError, csv.Error)):
            raise EvaluationError(f"{self._path} is not {self._expected}: {type(error).__name__} {error}.") from error


Reader = Callable[[Files], Captions]
