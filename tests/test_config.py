from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from cots.config import PretrainConfig, read_config
from cots.errors import ConfigError
from cots.settings import Settings
from cots.tokenizer_config import VisualTokenizerTrainingConfig


def _undocumented(kind: type[Settings], section: str = "") -> Iterator[str]:
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Settings):
            yield from _undocumented(inner, f"{section}{name}.")
        else:
            within = [part for part in get_args(inner) if isinstance(part, type) and issubclass(part, Settings)]
            for part in within:
                yield from _undocumented(part, f"{section}{name}.")
            if not (field.description or "").endswith("."):
                yield f"{section}{name}"


@pytest.mark.parametrize("kind", [PretrainConfig, VisualTokenizerTrainingConfig])
def test_every_setting_is_documented_where_it_stands(kind: type[Settings]) -> None:
    assert list(_undocumented(kind)) == []


def _config(path: Path, text: str, *overrides: str) -> PretrainConfig:
    path.write_text(text)
    return read_config(path, overrides)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.yaml"


def test_what_is_not_given_has_its_default(file: Path) -> None:
    assert _config(file, "") == PretrainConfig()
    assert _config(file, "training: {epochs: 3}").training.epochs == 3


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("trainig: {epochs: 1}", "trainig", "training"),
        ("training: {epoch: 1}", "training.epoch", "training.epochs"),
        ("model: {image_tower: {pool: cls}}", "model.image_tower.pool", "model.image_tower.pooling"),
        ("data: {train: [{pth: a.tar, path: a.tar}]}", "data.train.0.pth", "data.train.path"),
        ("epochs: 1", "epochs", "training.epochs"),
        ("optimizer: {lr: 1}", "optimizer.lr", "optimizer.learning_rate"),
    ],
)
def test_an_unknown_key_names_the_nearest(file: Path, text: str, unknown: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as error:
        _config(file, text)
    assert str(error.value) == f"{file}: there is no setting {unknown!r}; did you mean {nearest!r}?"


def test_overrides_lie_on_top_in_order(file: Path) -> None:
    config = _config(
        file,
        "training: {epochs: 1, seed: 7}",
        "training.epochs=2",
        "training.epochs=5",
        "optimizer.learning_rate=1e-3",
        "objective.contrastive.in_batch=online",
        "model.image_tower.architecture={depth: 2}",
        "training.resume=true",
        "optimizer.image_tower_rate=null",
    )
    assert (config.training.epochs, config.training.seed, config.training.resume) == (5, 7, True)
    assert config.optimizer.learning_rate == 1e-3
    assert config.optimizer.image_tower_rate is None
    assert config.objective.contrastive.in_batch == "online"
    assert config.model.image_tower.architecture == {"depth": 2}


@pytest.mark.parametrize(
    ("given", "sources"),
    [
        ("a.tar", [("a.tar", 1)]),
        ("[a.tar, {path: b.jsonl, weight: 2}]", [("a.tar", 1), ("b.jsonl", 2)]),
        ("{path: b.jsonl, weight: 2}", [("b.jsonl", 2)]),
    ],
)
def test_a_source_is_given_as_a_path_too(file: Path, given: str, sources: list[tuple[str, float]]) -> None:
    config = _config(file, "training: {epochs: 1}", f"data.train={given}", f"data.validation={given}")
    assert [(source.path, source.weight) for source in config.data.train] == sources
    assert config.data.validation == config.data.train


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.epochs", r"has no value; write it as section\.key=value"),
        ("=3", "has no value"),
        ("training.epochs.more=3", "goes through 'epochs', which is not a section"),
        ("training.epochs=[1", "not valid YAML"),
        ("training.epoch=1", r"no setting 'training\.epoch'; did you mean 'training\.epochs'"),
    ],
)
def test_an_override_that_cannot_be_used(file: Path, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        _config(file, "training: {epochs: 1}", override)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("training: {epochs: many}", r"training\.epochs: .*number.*\(got 'many'\)"),
        ("training: {batch_size: 1}", r"training\.batch_size: .*greater than or equal to 2 \(got 1\)"),
        ("training: 3", r"training: .*\(got 3\)"),
        ("data: {train: 3}", r"data\.train: 3 is not a source; give a path, or \{path: \.\.\., weight: \.\.\.\}\.$"),
        ("data: {train: [{pat: a.tar}]}", r"data\.train\.0\.path: Field required"),
        ("training: {precision: fp8}", r"training\.precision: .*'auto', 'bf16' or 'fp32' \(got 'fp8'\)"),
        (
            "model: {text_tower: {max_length: 99, positions: 32}}",
            r"yaml: model\.text_tower: max_length 99 exceeds the 32 positions of the text tower\.$",
        ),
        ("training: {epochs: x, seed: y}", r"training\.epochs.*training\.seed"),
        ("training: {epochs: .inf}", r"training\.epochs: .*finite number \(got inf\)"),
        ("objective: {noise_filter: {deviations: .nan}}", r"deviations: .*finite number \(got nan\)"),
        ("training: {seed: -1}", r"training\.seed: .*greater than or equal to 0 \(got -1\)"),
        ("training: {seed: 0x10000000000000000}", r"training\.seed: .*less than 9223372036854775808"),
        ("optimizer: {betas: [0.9, 1.0]}", r"optimizer\.betas\.1: .*less than 1 \(got 1\.0\)"),
        (
            "optimizer: {schedule: constant, warmup: 0.5, cooldown: 0.6}",
            "cooldown 0.6 are together more than",
        ),
        ("model: {image_tower: {std: [0.5, 0, 0.5]}}", r"std\.1: .*greater than 0 \(got 0\)"),
        ("data: {augmentation: {crop_scale: [0, 1]}}", r"crop_scale\.0: .*greater than 0 \(got 0\)"),
        ("data: {augmentation: {rand_augment: 5}}", r"rand_augment: .*less than or equal to 4 \(got 5\)"),
        (
            "data: {augmentation: {crop_scale: [1, 0.5]}}",
            r"crop_scale \[1, 0\.5\] is a range; give the smaller",
        ),
        ("data: {augmentation: {crop_ratio: [-1, 1]}}", r"crop_ratio\.0: .*greater than 0 \(got -1\)"),
        (
            "objective: {contrastive: {weight: 0, queue_size: 0}, task_alignment: {weight: 1}}",
            "but one candidate for each pair and nothing to align; set contrastive.in_batch=online",
        ),
        ("objective: {learn_temperature: true, temperature: 1}", r"temperature 1 lies outside of \[0\.01, 0\.5\]"),
        (
            "objective: {task_alignment: {weight: 1, target: momentum, gradient: both}}",
            "momentum targets do not learn; leave gradient at prediction",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_place(file: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        _config(file, text)


def test_files_that_hold_no_configuration(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read: No such file"):
        read_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_config(tmp_path)
    with pytest.raises(ConfigError, match="not valid YAML"):
        _config(file, "training: {epochs: 1")
    with pytest.raises(ConfigError, match="must be a mapping of sections, not a list"):
        _config(file, "- a\n- b")
    file.write_bytes(b"\x89PNG\r\n\xff\xfe")
    with pytest.raises(ConfigError, match="not a UTF-8 text file"):
        read_config(file)


def test_environment_variables_are_expanded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTS_TEST_DATA", "/data")
    monkeypatch.setenv("COTS_TEST_RATES", "[0.9, 0.95]")
    monkeypatch.delenv("COTS_TEST_NONE", raising=False)
    text = "data: {train: [{path: $COTS_TEST_DATA/a.tar}]}"
    assert _config(file, text).data.train[0].path == "/data/a.tar"
    config = _config(
        file,
        text,
        "data.validation=[{path: '${COTS_TEST_DATA}/b.tar'}]",
        "training.output=$COTS_TEST_NONE/x",
        "optimizer.betas=$COTS_TEST_RATES",
    )
    assert config.data.validation[0].path == "/data/b.tar"
    assert config.training.output == "$COTS_TEST_NONE/x"
    assert config.optimizer.betas == (0.9, 0.95)


def test_a_tilde_at_the_beginning_is_the_home_directory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    text = "data: {train: [{path: ~/a.tar}, {path: b~/c.tar}]}\nstart: {model: ~}\ntraining: {output: '~'}"
    config = _config(file, text, "data.validation=[{path: ~/d.tar}]", "model.text_tower.tokenizer=~/vocab.txt")
    assert [source.path for source in config.data.train] == ["/home/someone/a.tar", "b~/c.tar"]
    assert config.data.validation[0].path == "/home/someone/d.tar"
    assert config.model.text_tower.tokenizer == "/home/someone/vocab.txt"
    assert config.training.output == "/home/someone"
    assert config.start.model is None  # YAML's null


def test_crops_have_the_size_of_the_tower_unless_another_is_given(file: Path) -> None:
    text = "model: {image_tower: {image_size: 224}}"
    assert _config(file, text).crop_size == 224
    assert _config(file, text, "data.image_size=192").crop_size == 192
