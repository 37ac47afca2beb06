"""A model that somebody writes: a class of a few lines, which knows colours and nothing of videos."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from cots.data.square_transform import SquareTransform
from cots.errors import EvaluationError
from cots.evaluation.evaluate import evaluate
from cots.model.retrieval_model import RetrievalModel
from index.build import build
from index.gallery import open_gallery
from index.search import Searcher

COLOURS = ("red", "green", "blue")


class ColourModel(RetrievalModel):
    """The mean colour of a picture, and the first colour that a sentence names."""

    handles_video = False

    def __init__(self) -> None:
        super().__init__("colours", "c0105", len(COLOURS), torch.device("cpu"), SquareTransform(8, "squash"))

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return pixels.float().mean(dim=(2, 3))

    def _token_ids(self, texts: list[str]) -> Tensor:
        return torch.tensor([[next(COLOURS.index(word) for word in text.split() if word in COLOURS)] for text in texts])

    def _encode_tokens(self, token_ids: Tensor) -> Tensor:
        return torch.eye(len(COLOURS))[token_ids[:, 0]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A picture of each colour and an animation of all."""
    folder = tmp_path / "media"
    folder.mkdir()
    pictures = [Image.new("RGB", (20, 20), colour) for colour in COLOURS]
    for colour, picture in zip(COLOURS, pictures):
        picture.save(folder / f"{colour}.png")
    pictures[0].save(folder / "all.gif", save_all=True, append_images=pictures[1:], duration=500)
    return folder


def test_its_gallery_holds_the_pictures_and_names_the_videos(folder: Path, tmp_path: Path) -> None:
    model = ColourModel()
    report = build([folder], tmp_path / "gallery", model)
    assert (report.added, report.vectors) == (3, 3)
    assert [str(error) for error in report.failed] == [f"{folder}/all.gif: the model colours embeds images only"]
    hits = Searcher(open_gallery(tmp_path / "gallery"), model).search("a red square", k=3).hits
    assert Path(hits[0].path).name == "red.png"
    assert len(hits) == 3


def test_it_is_evaluated_on_pictures(folder: Path) -> None:
    rows = [{"image": f"{colour}.png", "captions": [f"a {colour} square"]} for colour in COLOURS]
    (folder / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(folder / "pictures.jsonl", ColourModel()).to_json(resamples=20)["text_to_image"]["R@1"] == 100


def test_it_is_refused_on_videos_before_anything_is_decoded(folder: Path) -> None:
    (folder / "empty.mp4").write_bytes(b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2" + bytes(64))
    rows = [{"video": "empty.mp4", "captions": ["a red square"]}, {"video": "all.gif", "captions": ["a blue square"]}]
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(EvaluationError, match=r"The model colours embeds images only; .* needs one for videos"):
        evaluate(folder / "clips.jsonl", ColourModel())
