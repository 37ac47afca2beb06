"""Workers of a process that holds a GPU: the same batches, other parents, and an end with their trainer."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from cots.config import DataConfig, PretrainConfig, SourceConfig
from cots.errors import MediaError, TrainingError
from cots.model.caption_tokenizer import WordPieceTokenizer
from cots.model.clip_tokenizer import ClipTokenizer
from pretrain import loader_workers
from pretrain.loader import Batch, StepSampler, training_loader
from pretrain.loader_workers import WorkerLoader
from pretrain.pair_sources import TablePairs, open_source
from pretrain.tokenizer_pictures import SquareFrames, decode_all, squares_from_loader

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are spawned")

# no `if __name__ == "__main__"`: a worker that ran it again would train
SCRIPT = """
import faulthandler
import signal
import sys
from pathlib import Path
from cots.config import PretrainConfig
from pretrain import loader_workers
from pretrain.trainer import pretrain

faulthandler.register(signal.SIGUSR1)
loader_workers.holds_gpu = lambda: True
print("training")
try:
    pretrain(PretrainConfig.model_validate_json(Path(sys.argv[1]).read_text()))
except KeyboardInterrupt:
    sys.exit(130)
"""

# Python keeps what led to an error that nobody caught, and with it the loader and its workers, until the very end.
FAULTY = """
import sys
from pathlib import Path
from cots.config import PretrainConfig
from pretrain import loader_workers
from pretrain.trainer import Run, pretrain

if "held" in sys.argv:
    loader_workers.holds_gpu = lambda: True
Run._log = lambda self: 1 / 0
pretrain(PretrainConfig.model_validate_json(Path(sys.argv[1]).read_text()))
"""


@pytest.fixture
def gpu_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process holds a GPU, or believes so where there is none."""
    if torch.cuda.is_available():
        torch.cuda.init()
    else:
        monkeypatch.setattr(loader_workers, "holds_gpu", lambda: True)


@pytest.fixture
def loader(shards: Path, vocabulary_file: Path, tmp_path: Path) -> Callable[..., DataLoader]:
    """Of two shards and a table, one of whose entries is left out and one bad."""
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    (tmp_path / "note.txt").write_text("no picture")
    (tmp_path / "pairs.jsonl").write_text(
        '{"path": "broken.png", "caption": "a dog"}\n{"path": "note.txt", "caption": "a note"}\n'
    )
    config = DataConfig(
        train=[SourceConfig(path=str(shards / "train-*.tar")), SourceConfig(path=str(tmp_path / "pairs.jsonl"))],
        captions_per_item=2,
    )
    sources = [open_source(source) for source in config.train]
    assert isinstance(sources[1], TablePairs)
    assert len(sources[1].left_out) == 1
    tokenizer = WordPieceTokenizer.from_file(vocabulary_file, 16)

    def make(workers: int, first_step: int = 0) -> DataLoader:
        sampler = StepSampler([len(source) for source in sources], [1.0, 1.0], 7, 3, 0, 1).between(first_step, 9)
        data = config.model_copy(update={"workers": workers})
        return training_loader(sources, data, tokenizer, 32, sampler, pin_memory=False)

    return make


def _same(some: list[Batch], others: list[Batch]) -> bool:
    return all(
        torch.equal(one.pixels, other.pixels)
        and torch.equal(one.token_ids, other.token_ids)
        and torch.equal(one.item_ids, other.item_ids)
        and (one.bad, one.numbers) == (other.bad, other.numbers)
        for one, other in zip(some, others, strict=True)
    )


@linux
@pytest.mark.usefixtures("gpu_held")
def test_workers_of_a_process_that_holds_a_gpu_load_the_same_and_are_not_its_children(
    loader: Callable[..., DataLoader],
) -> None:
    expected = list(loader(0))
    assert sum(len(batch.bad) for batch in expected) > 0
    of_other_tests = multiprocessing.active_children()
    batches = iter(loader(2))
    started = [process for process in multiprocessing.active_children() if process not in of_other_tests]
    workers = [process.pid for process in started if process.pid]
    assert len(workers) == 2
    parents = {_parents()[worker] for worker in workers}
    assert os.getpid() not in parents
    assert len(parents) == 1
    assert _same(list(batches), expected)
    assert _same(list(loader(1, first_step=4)), expected[4:])
    del batches
    assert _until(lambda: not set(workers) & _parents().keys())


@linux
@pytest.mark.usefixtures("gpu_held")
def test_signals_that_a_whole_job_gets_leave_workers_at_work(loader: Callable[..., DataLoader]) -> None:
    of_other_tests = multiprocessing.active_children()
    batches = iter(loader(2))
    first = next(batches)
    started = [process for process in multiprocessing.active_children() if process not in of_other_tests]
    workers = {process.pid for process in started if process.pid}
    for process in workers | {_parents()[worker] for worker in workers}:
        os.kill(process, signal.SIGINT)
        os.kill(process, signal.SIGTERM)
    assert _same([first, *batches], list(loader(0)))
    assert _same(list(loader(1)), list(loader(0)))  # the server lives on too


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_worker_finds_wrong_is_one_sentence(tmp_path: Path, vocabulary_file: Path, workers: int) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    (tmp_path / "pairs.jsonl").write_text('{"path": "broken.png", "caption": "a dog"}\n')
    config = DataConfig(train=[SourceConfig(path=str(tmp_path / "pairs.jsonl"))], workers=workers)
    sampler = StepSampler([1], [1.0], 1, 3, 0, 1).between(0, 2)
    tokenizer = WordPieceTokenizer.from_file(vocabulary_file, 16)
    loader = training_loader([open_source(config.train[0])], config, tokenizer, 32, sampler, pin_memory=False)
    with pytest.raises(TrainingError) as caught:
        list(loader)
    assert str(caught.value).startswith("16 samples in a row could not be read, the last")
    assert "Traceback" not in str(caught.value)
    with pytest.raises(MediaError) as unreadable:
        list(WorkerLoader(SquareFrames([open_source(config.train[0])], 32), workers))
    assert "Traceback" not in str(unreadable.value)


def test_workers_of_a_process_without_a_gpu_load_the_same(loader: Callable[..., DataLoader]) -> None:
    forked, spawned = loader(2), loader(2)
    spawned.multiprocessing_context = "spawn"
    expected = list(loader(0))
    assert _same(list(forked), expected)
    assert _same(list(spawned), expected)


@linux
@pytest.mark.usefixtures("gpu_held")
def test_squares_are_the_same_from_workers_of_a_process_that_holds_a_gpu(shards: Path) -> None:
    sources = [open_source(SourceConfig(path=str(shards / "train-*.tar")))]
    alone, shared = (decode_all(sources, 32, workers) for workers in (0, 2))
    assert torch.equal(alone.frames, shared.frames)
    sampler, cpu = StepSampler([len(sources[0])], [1.0], 8, 3, 0, 1).between(0, 4), torch.device("cpu")
    steps = [list(squares_from_loader(SquareFrames(sources, 32), sampler, 3, workers, cpu)) for workers in (0, 2)]
    for one, other in zip(*steps, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.draws, other.draws)


@linux
@pytest.mark.usefixtures("gpu_held")
def test_clips_byte_pairs_reach_such_workers(shards: Path) -> None:
    pytest.importorskip("open_clip")
    config = DataConfig(train=[SourceConfig(path=str(shards / "train-0.tar"))])
    sources, tokenizer = [open_source(source) for source in config.train], ClipTokenizer.create(24)
    sampler = StepSampler([len(sources[0])], [1.0], 8, 3, 0, 1).between(0, 3)
    loaders = (
        training_loader(
            sources, config.model_copy(update={"workers": workers}), tokenizer, 32, sampler, pin_memory=False
        )
        for workers in (0, 1)
    )
    assert _same(*(list(one) for one in loaders))


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_their_trainer(
    make_config: Callable[..., PretrainConfig], tmp_path: Path, number: signal.Signals
) -> None:
    config = make_config(data={"workers": 2}, training={"epochs": 100_000})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    (tmp_path / "train.py").write_text(SCRIPT)
    log = Path(config.training.output) / "log.jsonl"
    command = [sys.executable, str(tmp_path / "train.py"), str(tmp_path / "config.json")]
    with (tmp_path / "output.txt").open("w") as output:
        trainer = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        assert _until(lambda: (log.exists() and len(log.read_text().splitlines()) > 5) or trainer.poll() is not None)
        assert trainer.poll() is None, (tmp_path / "output.txt").read_text()
        family = _descendants(trainer.pid)
        parents = _parents()
        assert len([process for process in family if parents[process] != trainer.pid]) == 2  # the server's
        if number == signal.SIGKILL:
            trainer.kill()
        else:
            os.killpg(trainer.pid, number)  # as a terminal or a scheduler does
        code = _ended(trainer, tmp_path / "output.txt")
    finally:
        trainer.kill()
    text = (tmp_path / "output.txt").read_text()
    assert code == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 0}[number], text
    assert _until(lambda: not family & _parents().keys())
    if number != signal.SIGKILL:  # a worker's thread that was writing a batch may complain
        assert "Traceback" not in text
    assert text.count("training\n") == 1
    if number == signal.SIGTERM:
        assert "resume with training.resume=true" in text
        assert list(Path(config.training.output).glob("checkpoints/*.pt"))


def test_a_worker_says_nothing_of_a_trainer_that_takes_no_more_batches(capfd: pytest.CaptureFixture) -> None:
    hook = loader_workers._but_for_a_trainer_that_has_gone
    for error in (ConnectionResetError(), EOFError(), ValueError("something else")):
        hook(type(error), error, None)
    assert capfd.readouterr().err == "ValueError: something else\n"


@pytest.mark.parametrize("gpu", ["held", "none"])
def test_a_trainer_that_fails_ends(make_config: Callable[..., PretrainConfig], tmp_path: Path, gpu: str) -> None:
    config = make_config(data={"workers": 2}, training={"epochs": 100_000})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    (tmp_path / "train.py").write_text(FAULTY)
    command = [sys.executable, str(tmp_path / "train.py"), str(tmp_path / "config.json"), gpu]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")


def _ended(trainer: subprocess.Popen, output: Path) -> int:
    """The exit status, or a failure that shows where each of its threads hangs."""
    try:
        return trainer.wait(60)
    except subprocess.TimeoutExpired:
        trainer.send_signal(signal.SIGUSR1)
        time.sleep(2)
        pytest.fail(f"the trainer goes on\n{output.read_text()}")


def _parents() -> dict[int, int]:
    """The parent of every process that runs."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has just ended
            continue
        if state != "Z":
            found[int(entry.name)] = int(parent)
    return found


def _descendants(ancestor: int) -> set[int]:
    parents, found = _parents(), {ancestor}
    while more := {process for process, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {ancestor}


def _until(condition: Callable[[], bool], seconds: float = 90.0) -> bool:
    """Whether a condition comes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False
