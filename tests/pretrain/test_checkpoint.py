import signal
import threading
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from cots.errors import ConfigError, TrainingError
from pretrain.checkpoint import (
    checkpoint_to_resume,
    latest_checkpoint,
    random_state,
    read_checkpoint,
    restore_random_state,
    save_checkpoint,
    writing_to,
)
from pretrain.distributed import Ranks

CPU = torch.device("cpu")


def test_the_last_few_are_kept_and_the_newest_is_found(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (9, 10, 100, 1000):
        save_checkpoint(tmp_path, {"step": step}, step, keep=2)
        (tmp_path / "checkpoints" / "step-00000011.tmp").write_bytes(b"what a killed run leaves")
    save_checkpoint(tmp_path, {"step": 1000}, 1000, keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000100.pt", "step-00001000.pt"]
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert read_checkpoint(newest) == {"step": 1000}


def test_a_run_is_resumed_only_when_it_is_asked_for(tmp_path: Path) -> None:
    assert checkpoint_to_resume(tmp_path, resume=False) is None
    path = save_checkpoint(tmp_path, {"step": 1}, 1, keep=2)
    assert checkpoint_to_resume(tmp_path, resume=True) == path
    with pytest.raises(ConfigError, match=r"holds a run already; resume with training\.resume=true or choose another"):
        checkpoint_to_resume(tmp_path, resume=False)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_a_checkpoint_is_read_as_it_is_needed_and_outlives_its_file(tmp_path: Path) -> None:
    weights = torch.randn(8_000_000)
    path = save_checkpoint(tmp_path, {"weights": weights}, 1, keep=1)
    held = _private_memory()
    state = read_checkpoint(path)
    assert _private_memory() - held < weights.nbytes / 2
    save_checkpoint(tmp_path, {"weights": -weights}, 2, keep=1)
    assert not path.exists()
    assert torch.equal(state["weights"], weights)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    content = newest.read_bytes()
    read_checkpoint(newest)["weights"].zero_()
    assert newest.read_bytes() == content


def _private_memory() -> int:
    """Bytes of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, {"weights": torch.randn(1000)}, 1, keep=1)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not a checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(
            TrainingError, match=r"step-00000001\.pt is damaged \([^.]*\); remove it to go on from an earlier one"
        ):
            read_checkpoint(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"step": 1}, 1, keep=1)
    for state in ({"step": 2}, {"weights": torch.zeros(2_000_000)}):
        (tmp_path / "checkpoints" / "step-00000002.tmp").symlink_to("/dev/full")  # a disk that is full
        with pytest.raises(
            TrainingError,
            match=r"step-00000002\.pt cannot be written \(No space left on device\), .*step-00000001\.pt is intact; "
            r"make room and resume with training\.resume=true",
        ):
            save_checkpoint(tmp_path, state, 2, keep=1)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert read_checkpoint(newest) == {"step": 1}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_first_checkpoint_that_cannot_be_written_is_not_said_to_have_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000001.tmp").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match="and there is no earlier one; make room"):
        save_checkpoint(tmp_path, {"step": 1}, 1, keep=1)


def test_ctrl_c_waits_until_a_checkpoint_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.save

    def interrupted(state: dict, file: BinaryIO) -> None:
        signal.raise_signal(signal.SIGINT)
        save(state, file)

    monkeypatch.setattr(torch, "save", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, {"step": 3}, 3, keep=2)
    assert signal.getsignal(signal.SIGINT) is before
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert read_checkpoint(found) == {"step": 3}
    assert list(found.parent.iterdir()) == [found]
    monkeypatch.undo()
    thread = threading.Thread(target=save_checkpoint, args=(tmp_path, {"step": 4}, 4, 2))  # sees no signals
    thread.start()
    thread.join()
    assert latest_checkpoint(tmp_path) != found


def test_a_file_elsewhere_that_is_gone_is_no_fault_of_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing_to(tmp_path / "run"):
        (tmp_path / "words.txt").read_text()
    with pytest.raises(TrainingError, match=r"log\.jsonl cannot be written"), writing_to(tmp_path / "run"):
        (tmp_path / "run" / "log.jsonl").open("a")


def test_the_random_state_comes_back() -> None:
    torch.manual_seed(5)
    states = random_state(CPU)
    drawn = torch.rand(4)
    restore_random_state(states, Ranks(0, 1, CPU), 7, 100)
    assert torch.equal(torch.rand(4), drawn)


def test_a_gpu_that_is_not_used_is_not_asked_for_its_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (state,) = random_state(CPU)  # would fail without a GPU, and on one take memory of it
    assert state.keys() == {"cpu"}
    restore_random_state([{**state, "cuda": state["cpu"]}], Ranks(0, 1, CPU))


def test_another_number_of_ranks_draws_anew_each_for_itself_and_alike_each_time() -> None:
    states = random_state(CPU)

    def draws(rank: int, ranks: int, *seeds: int) -> tuple[float, ...]:
        restore_random_state(states, Ranks(rank, ranks, CPU), *seeds)
        return tuple(torch.rand(4).tolist())

    two = [draws(rank, 2, 7, 100) for rank in (0, 1)]
    assert two == [draws(rank, 2, 7, 100) for rank in (0, 1)]
    assert len({*two, draws(0, 1, 7, 100), draws(0, 2, 7, 101), draws(0, 2, 8, 100)}) == 5
