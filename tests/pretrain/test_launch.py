import subprocess
import sys
from pathlib import Path

import pytest

from cots.errors import ConfigError
from pretrain.__main__ import main
from pretrain.launch import launch

ROOT = Path(__file__).parents[2]


def test_a_section_decides_which_training_a_file_is(tmp_path: Path) -> None:
    tokenizer, towers = tmp_path / "tokenizer.yaml", tmp_path / "towers.yaml"
    tokenizer.write_text("visual_tokenizer: {codebook_size: 64}\nmodel: {}\n")
    towers.write_text("model: {}\n")
    with pytest.raises(ConfigError, match="no setting 'model'"):
        launch(tokenizer)
    with pytest.raises(ConfigError, match=r"objective\.kl_weight"):
        launch(towers, ["objective.kl_weight=1"])
    with pytest.raises(ConfigError, match="cannot be read"):
        launch(tmp_path / "nonesuch.yaml")


def test_a_users_error_is_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", str(tmp_path / "nonesuch.yaml")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: The configuration")
    assert done.stderr.count("\n") == 1


def test_the_usage_is_told_where_it_is_asked_for() -> None:
    assert [main(arguments) for arguments in ([], ["--help"])] == [2, 0]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--out", "soup"], 2, "give runs and --validation, or --start"),
        (["nonesuch", "--out", "soup", "--validation", "val.tar"], 1, "Error: "),
    ],
)
def test_a_soup_of_nothing_is_one_sentence(arguments: list[str], code: int, words: str) -> None:
    command = [sys.executable, "-m", "pretrain.soup", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
