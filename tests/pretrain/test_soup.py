import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cots.config import ModelConfig, PretrainConfig, SourceConfig
from cots.errors import ConfigError, ModelError
from cots.model.caption_tokenizer import WordPieceTokenizer
from cots.model.dual_encoder import DualEncoder
from cots.model.model_directory import read_model, save_model
from cots.model.pretrained import load_model
from pretrain import soup
from pretrain.release import release
from pretrain.soup import greedy_soup, read_record, save_start
from pretrain.validation import Metrics, Validation

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(
    make_config: Callable[..., PretrainConfig], tiny_model_config: ModelConfig, vocabulary_file: Path, shards: Path
) -> MakeRun:
    """A run as a training leaves it: all begin at the same weights, and go a little from there."""

    def make(name: str, train: str = "train-0.tar", size: int | None = None, words: list[str] | None = None) -> Path:
        config = make_config(name, data={"train": [{"path": str(shards / train)}]})
        model, vocabulary = tiny_model_config, vocabulary_file
        if size:
            tower = model.image_tower.model_copy(update={"image_size": size})
            model = model.model_copy(update={"image_tower": tower})
        run = Path(config.training.output)
        run.mkdir()
        if words:
            vocabulary = run / "vocab.txt"
            vocabulary.write_text("\n".join(words))
        torch.manual_seed(0)
        encoder = DualEncoder(model)
        torch.manual_seed(len(list(run.parent.iterdir())))
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        save_model(run / "best", encoder, WordPieceTokenizer.from_file(vocabulary, model.text_tower.max_length))
        values = config.model_copy(update={"model": model}).model_dump(mode="json")
        (run / "config.yaml").write_text(yaml.safe_dump(values))
        return run

    return make


@pytest.fixture
def validation(shards: Path) -> list[str]:
    return [str(shards / "val-0.tar")]


@pytest.fixture
def all_better(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Each measurement is as good as the one before, so that every run is added; returns what was measured."""
    measured: list[Any] = []
    measure = Validation.measure

    def counted(self: Validation, encoder: DualEncoder, device: torch.device) -> dict[str, Metrics]:
        measured.append(measure(self, encoder, device))
        return measured[-1]

    monkeypatch.setattr(Validation, "measure", counted)
    monkeypatch.setattr(soup, "criterion", lambda results: 1.0)
    return measured


def test_a_soup_is_the_mean_and_says_what_went_into_it(
    make_run: MakeRun, validation: list[str], shards: Path, tmp_path: Path, all_better: list[Any]
) -> None:
    runs, out = [make_run("a"), make_run("b", "train-1.tar"), make_run("c")], tmp_path / "soup"
    results = greedy_soup(runs, out, validation)
    states = [read_model(run / "best")[0].state_dict() for run in runs]
    for name, value in read_model(out / "best")[0].state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, sum(state[name] for state in states) / 3)
    record = read_record(out)
    assert record is not None
    assert list(record.trainings) == [str(run) for run in runs]
    assert [Path(source.path).name for source in record.sources] == ["train-0.tar", "train-1.tar"]
    card = (out / "best" / "MODEL_CARD.md").read_text()
    assert f"the average of 3 trainings ({runs[0]}, {runs[1]}, {runs[2]})" in card
    assert f"Trained on: {shards / 'train-0.tar'} (x1), {shards / 'train-1.tar'} (x1)\n" in card
    assert f"| text to image | {results[validation[0]]['text_to_image']['R@1']:.1f} |" in card


def test_no_model_is_measured_twice(
    make_run: MakeRun, validation: list[str], tmp_path: Path, all_better: list[Any]
) -> None:
    results = greedy_soup([make_run(name) for name in "abc"], tmp_path / "soup", validation)
    assert len(all_better) == 3 + 2  # each alone, then the two averages
    assert results == all_better[-1]


def test_a_release_of_a_soup_names_all_that_it_was_trained_on(
    make_run: MakeRun, validation: list[str], shards: Path, tmp_path: Path, all_better: list[Any]
) -> None:
    runs, out = [make_run("a"), make_run("b", "train-1.tar")], tmp_path / "soup"
    greedy_soup(runs, out, validation)
    greedy_soup([out, make_run("c")], tmp_path / "second", validation)
    for number, directory in ((2, out), (3, tmp_path / "second")):
        release(directory, tmp_path / "released", validation, centering=0.5)
        card = (tmp_path / "released" / "MODEL_CARD.md").read_text()
        assert f"the average of {number} trainings ({runs[0]}, {runs[1]}" in card
        assert f"Trained on: {shards / 'train-0.tar'} (x1), {shards / 'train-1.tar'} (x1)\n" in card
        assert "shifted by 0.5 times the training pairs' means" in card


def test_a_record_is_that_of_the_model_beside_it(
    make_run: MakeRun, validation: list[str], tmp_path: Path, all_better: list[Any]
) -> None:
    runs, out = [make_run("a"), make_run("b")], tmp_path / "soup"
    greedy_soup(runs, out, validation)
    (out / "soup.json").rename(tmp_path / "soup.json")
    release(out, tmp_path / "released", validation)  # an older soup, without a record
    assert "average of" not in (tmp_path / "released" / "MODEL_CARD.md").read_text().partition("Clips")[0]
    shutil.copy(tmp_path / "soup.json", runs[0])
    assert read_record(runs[0]) is None
    (runs[0] / "soup.json").write_text(json.dumps({"fingerprint": 1}))
    with pytest.raises(ConfigError, match=r"soup\.json"):
        read_record(runs[0])


def test_a_source_is_named_once_for_each_weight() -> None:
    once, twice = SourceConfig(path="a.tar"), SourceConfig(path="a.tar", weight=2)
    record = soup.SoupRecord(fingerprint="", trainings={"a": [once], "b": [twice, once]})
    assert record.sources == [once, twice]


def test_nothing_that_was_written_is_overwritten(
    make_run: MakeRun, make_config: Callable[..., PretrainConfig], validation: list[str], tmp_path: Path
) -> None:
    runs, other = [make_run("a"), make_run("b")], make_run("other")
    greedy_soup(runs, tmp_path / "soup", validation)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out in (other, runs[0], runs[1], tmp_path / "soup"):
        with pytest.raises(ConfigError, match="holds a run already"):
            greedy_soup(runs, out, validation)
        with pytest.raises(ConfigError, match="holds a run already"):
            save_start(make_config("unused"), out)
    with pytest.raises(ConfigError, match="holds a model already"):
        greedy_soup(runs, other / "best", validation)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_other_architectures_and_tokenizers_are_refused(
    make_run: MakeRun, vocabulary_file: Path, validation: list[str], tmp_path: Path
) -> None:
    first, larger = make_run("a"), make_run("larger", size=96)
    words = vocabulary_file.read_text().splitlines()
    other = make_run("words", words=[*words[:-2], words[-1], words[-2]])
    for runs in ([first, larger], [larger, first]):
        with pytest.raises(ModelError, match=r"model\.image_tower\.image_size (64|96), .* (64|96); "):
            greedy_soup(runs, tmp_path / "soup", validation)
    with pytest.raises(ModelError, match="another tokenizer"):
        greedy_soup([first, other], tmp_path / "soup", validation)
    with pytest.raises(ConfigError, match="given twice"):
        greedy_soup([first, first], tmp_path / "soup", validation)
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize("best", [0, 1])
def test_the_saved_settings_are_the_best_runs(
    make_run: MakeRun, validation: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: int
) -> None:
    """Dropout may differ: it leaves no trace in what a model computes."""
    runs, out = [make_run("a"), make_run("b")], tmp_path / "soup"
    for run, dropout in zip(runs, (0.1, 0.3), strict=True):
        for file in (run / "best" / "config.json", run / "config.yaml"):
            values = yaml.safe_load(file.read_text())
            values["model"]["text_tower"]["dropout"] = dropout
            file.write_text(json.dumps(values))
    scores = iter([best == 0, best == 1, 1, 1])
    monkeypatch.setattr(soup, "criterion", lambda results: float(next(scores)))
    greedy_soup(runs, out, validation)
    saved = [yaml.safe_load(file.read_text()) for file in (out / "best" / "config.json", out / "config.yaml")]
    assert [one["model"]["text_tower"]["dropout"] for one in saved] == [(0.1, 0.3)[best]] * 2
    assert load_model(str(out)).fingerprint


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({}, None),
        ({"training": {"seed": 8}}, "different seeds"),
        ({"start": {"text_tower": "bert"}}, "began with start.text_tower=bert, .* with random weights"),
        ({"start": {"model": "runs/start"}, "training": {"seed": 8}}, "began with start.model=runs/start"),
    ],
)
def test_runs_from_different_starts_are_named(
    make_run: MakeRun,
    validation: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, dict[str, Any]],
    warning: str | None,
) -> None:
    runs = [make_run("a"), make_run("b")]
    values = yaml.safe_load((runs[1] / "config.yaml").read_text())
    for section, changed in settings.items():
        values[section] |= changed
    (runs[1] / "config.yaml").write_text(yaml.safe_dump(values))
    greedy_soup(runs, tmp_path / "soup", validation)
    assert re.search(warning, caplog.text) if warning else not caplog.text


def test_one_start_may_be_trained_on_with_other_seeds(
    make_run: MakeRun, validation: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = [make_run("a"), make_run("b")]
    for seed, run in enumerate(runs):
        values = yaml.safe_load((run / "config.yaml").read_text())
        values["start"]["model"], values["training"]["seed"] = "runs/start", seed
        (run / "config.yaml").write_text(yaml.safe_dump(values))
    greedy_soup(runs, tmp_path / "soup", validation)
    assert not caplog.text
