"""What the benchmarks say of their runs (benchmarks/run_facts.py)."""

import re
import shlex
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from run_facts import command, run_facts, shortened


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("/home/me/cots/runs/base.npz", "runs/base.npz"),
        ("/home/me/cots/my clips/a.tar", "my clips/a.tar"),
        ("/home/me/cots", "."),
        ("/home/me/cots-2/base.npz", "base.npz"),
        ("/scratch/of me/out.json", "out.json"),
        ("../elsewhere/out.json", "out.json"),
        ("--json=/scratch/out.json", "--json=out.json"),
        ("data.train=[{path: '/scratch/train-*.tar'}, {path: /home/me/cots/b.tar}]",
         "data.train=[{path: 'train-*.tar'}, {path: b.tar}]"),
        ("open_clip:ViT-B-16//scratch/weights.pt", "open_clip:ViT-B-16/weights.pt"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", "open_clip:ViT-B-32/laion2b_s34b_b79k"),
        ("s3://bucket/photos", "s3://bucket/photos"),
        ("data/clips/val-*.tar", "data/clips/val-*.tar"),
        ("contrastive only, noisy", "contrastive only, noisy"),
        ("1/2", "1/2"),
    ],
)  # fmt: skip
def test_an_argument_tells_nothing_of_the_machine(argument: str, told: str) -> None:
    assert shortened(argument, Path("/home/me/cots")) == told


def test_a_command_can_be_typed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    script = str(Path(__file__).parents[1] / "benchmarks" / "search.py")
    typed = [script, "--arms", "cooler: objective.temperature=0.07", "--json", str(tmp_path / "out.json"), "a*.tar"]
    words = shlex.split(command(typed))
    assert words == ["OMP_NUM_THREADS=2", "python", "benchmarks/search.py", *typed[1:4], "out.json", "a*.tar"]


def test_facts_name_the_machine_and_what_is_installed() -> None:
    facts = run_facts()
    assert re.match(r"[1-9]\d* cores, ", facts["cpu"])
    assert {"torch", "timm", "numpy"} <= {each.split()[0] for each in facts["versions"].split(", ")}
    assert str(Path.home()) not in facts["command"]
