"""Building with several processes: the same gallery as with one, whoever dies on the way."""

import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gallery_media import write_picture

from cots.data.samples import Sample, iter_samples
from cots.embed import Progress, embed
from cots.errors import CotsError, MediaError, SourceError
from cots.model.pretrained import load_model
from cots.model.retrieval_model import RetrievalModel
from cots.moments import Moment
from index.build import build
from index.check import check
from index.crew import Outcomes, Recipe, embed_with
from index.gallery import open_gallery
from index.ledger import DEATHS_IN_A_ROW, Ledger
from index.listing import list_samples
from index.workers import ProcessCrew


class Deadly(Sample):
    """A picture at whose name the process dies, as in a decoder that overruns its memory."""

    def read_bytes(self) -> bytes:
        if "deadly" in self.path:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().read_bytes()


def deadly_samples(*arguments: Any, **named: Any) -> Iterator[Sample]:
    for sample in list_samples(*arguments, **named):
        yield Deadly(**{field.name: getattr(sample, field.name) for field in fields(sample)})


def rows(directory: Path) -> dict[tuple[str, float | None], np.ndarray]:
    """Vectors by path and start."""
    snapshot = open_gallery(directory).snapshot
    keys = zip(snapshot.rows["path"].to_pylist(), snapshot.rows["start"].to_pylist())
    return dict(zip(keys, snapshot.vectors.astype(np.float32)))


def assert_same_table(directory: Path, expected: Path) -> None:
    found, wanted = rows(directory), rows(expected)
    assert found.keys() == wanted.keys()
    assert len(open_gallery(directory).snapshot) == len(wanted)  # nothing twice
    for key in wanted:
        np.testing.assert_allclose(found[key], wanted[key], atol=2e-3)


def test_two_workers_build_what_one_process_builds(photos: Path, tmp_path: Path, tiny_model: RetrievalModel) -> None:
    content = (photos / "00.png").read_bytes()
    (photos / "truncated.png").write_bytes(content[: len(content) // 2])
    subprocess.run(["tar", "-cf", photos / "shard.tar", "00.png", "truncated.png", "03.png"], cwd=photos, check=True)
    steps: list[Progress] = []
    alone = build([photos], tmp_path / "alone", tiny_model)
    report = build([photos], tmp_path / "gallery", tiny_model, workers=2, progress=steps.append)
    assert (report.added, report.items, report.vectors) == (alone.added, alone.items, alone.vectors) == (17, 17, 23)
    assert sorted(map(str, report.failed)) == sorted(map(str, alone.failed))
    assert {Path(error.path).name for error in report.failed} == {"truncated.png", "shard.tar::truncated.png"}
    assert check(tmp_path / "gallery", tiny_model) == []
    assert_same_table(tmp_path / "gallery", tmp_path / "alone")
    assert [step.done + step.failed for step in steps] == list(range(1, 20))
    assert steps[-1].total == 19

    write_picture(photos / "00.png", 500)
    write_picture(photos / "new.png", 501)
    again = build([photos], tmp_path / "gallery", tiny_model, workers=2)
    assert (again.added, again.updated) == (1, 1)
    build([photos], tmp_path / "alone", tiny_model)
    assert_same_table(tmp_path / "gallery", tmp_path / "alone")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_workers_on_gpus_embed_what_one_process_embeds(photos: Path, tiny_model_dir: Path) -> None:
    model = load_model(str(tiny_model_dir), device="cuda")
    samples = list(iter_samples([photos], on_error=print))
    recipe = Recipe(str(tiny_model_dir), model.fingerprint, str(model.device), None, None)
    found = {
        result.sample.path: result.vectors for result in embed_with(ProcessCrew(2, recipe), samples, on_error=print)
    }
    assert len(found) == len(samples)
    for expected in embed(samples, model, on_error=print):
        np.testing.assert_allclose(found[expected.sample.path], expected.vectors, atol=5e-3)


def test_the_work_of_a_killed_worker_is_redone_and_nothing_is_doubled(
    tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    for seed in range(300):
        write_picture(tmp_path / "photos" / f"{seed:03}.png", seed)
    killed: list[int] = []
    of_other_tests = multiprocessing.active_children()

    def kill_one(step: Progress) -> None:
        if step.done == 20:
            victim = next(child for child in multiprocessing.active_children() if child not in of_other_tests).pid
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)

    report = build([tmp_path / "photos"], tmp_path / "gallery", tiny_model, workers=2, progress=kill_one)
    assert len(killed) == 1
    assert (report.added, report.failed) == (300, [])
    build([tmp_path / "photos"], tmp_path / "alone", tiny_model)
    assert check(tmp_path / "gallery", tiny_model) == []
    assert_same_table(tmp_path / "gallery", tmp_path / "alone")


def test_a_file_that_crashes_its_decoder_is_named_and_the_rest_is_there(
    photos: Path, tmp_path: Path, tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_picture(photos / "05-deadly.png", 1000)
    monkeypatch.setattr("index.build.list_samples", deadly_samples)
    told: list[MediaError] = []
    report = build([photos], tmp_path / "gallery", tiny_model, workers=1, on_error=told.append)
    assert [Path(error.path).name for error in report.failed] == ["05-deadly.png"]
    assert "crashes" in report.failed[0].reason
    assert "SIGSEGV" in report.failed[0].reason
    assert told == report.failed
    assert (report.added, report.items) == (15, 15)
    assert check(tmp_path / "gallery", tiny_model) == []


# Tells each step that it has done. Its workers inherit stderr. It commits once, at its end: Ctrl-C during a commit may
# lose what that was to keep.
BUILD = """
import sys
import index.writer
from cots.model.pretrained import load_model
from index.build import build
index.writer.COMMIT_SECONDS = 3600
try:
    model = load_model(sys.argv[2], device="cpu")
    build(["photos"], "gallery", model, workers=2, progress=lambda step: print(step.done, file=sys.stderr, flush=True))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(("end", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_workers_end_with_the_build_and_what_is_done_is_kept(
    tmp_path: Path, tiny_model_dir: Path, end: signal.Signals, code: int
) -> None:
    """Ctrl-C in a terminal reaches every process of the group; SIGKILL here only the coordinating one."""
    for seed in range(1000):
        write_picture(tmp_path / "photos" / f"{seed:04}.png", seed)
    command = [sys.executable, "-c", BUILD, tmp_path / "photos", tiny_model_dir]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        while process.stderr.readline() != "100\n":
            assert process.poll() is None
        if end == signal.SIGINT:
            os.killpg(process.pid, end)
        else:
            process.kill()
        _, said = process.communicate(timeout=120)  # waits until the last process that could write there has ended
    assert process.returncode == code
    assert [line for line in said.splitlines() if not line.isdecimal()] == []
    assert check(tmp_path / "gallery") == []
    if end == signal.SIGINT:
        assert 100 <= len(open_gallery(tmp_path / "gallery").snapshot) < 1000


# What the first and the second process that an interpreter starts hold back: 1 << (SIGINT - 1) of the mask.
HELD_BACK = """
import multiprocessing
from index.interrupts import interrupts_blocked
def show():
    print(*(line for line in open("/proc/self/status") if line.startswith("SigBlk")))
if __name__ == "__main__":
    for _ in range(2):
        process = multiprocessing.get_context("spawn").Process(target=show)
        with interrupts_blocked():
            process.start()
        process.join()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the masks of processes are Linux's to tell")
def test_no_process_sees_ctrl_c_not_even_the_first(tmp_path: Path) -> None:
    (tmp_path / "start.py").write_text(HELD_BACK)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(tmp_path / "start.py")]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    masks = [int(line.split()[1], 16) for line in said.splitlines() if line.strip()]
    assert len(masks) == 2
    assert all(mask & 1 << (signal.SIGINT - 1) for mask in masks)


def test_too_many_unreadable_files_stop_the_run(photos: Path, tmp_path: Path, tiny_model: RetrievalModel) -> None:
    of_other_tests = multiprocessing.active_children()
    for number in range(12):
        (photos / f"bad{number}.png").write_bytes((photos / "00.png").read_bytes()[:60])
    with pytest.raises(SourceError, match=r"could not be read, more than the allowed share of 0\.1"):
        build([photos], tmp_path / "gallery", tiny_model, workers=1, max_bad_share=0.1)
    assert set(multiprocessing.active_children()) <= set(of_other_tests)


def test_workers_that_find_another_model_say_so(photos: Path, tiny_model_dir: Path) -> None:
    of_other_tests = multiprocessing.active_children()
    recipe = Recipe(str(tiny_model_dir), "0123456789", "cpu", 1, None)
    samples = list(iter_samples([photos], on_error=print))
    with pytest.raises(CotsError, match=r"another model by the name .* than the one that builds .*\(01234567\)"):
        list(embed_with(ProcessCrew(1, recipe), samples, on_error=print))
    assert set(multiprocessing.active_children()) <= set(of_other_tests)


def test_workers_that_die_whatever_they_are_given_stop_the_run(tmp_path: Path) -> None:
    samples = [Sample(str(tmp_path / f"{number}.png"), "image") for number in range(100)]
    ledger = Ledger(samples, workers=2, window=10)
    for _ in range(2 * DEATHS_IN_A_ROW):
        ledger.take(1)
        ledger.bury(1, "the signal SIGKILL")
    with pytest.raises(CotsError, match=r"workers died one after another .* by the signal SIGKILL"):
        ledger.bury(1, "the signal SIGKILL")


@pytest.mark.parametrize("seed", range(20))
def test_whoever_dies_each_sample_is_settled_once(seed: int) -> None:
    """Workers that acknowledge in any order and die at random, or at one of three samples."""
    draw = random.Random(seed)
    kinds = draw.choices(["image", "video"], [4, 1], k=draw.randrange(1, 400))
    samples = [Sample(f"/{number}", kind) for number, kind in enumerate(kinds)]
    poisonous = set(draw.sample(range(len(samples)), min(3, len(samples))))
    workers = draw.randrange(1, 5)
    ledger = Ledger(samples, workers, window=draw.choice([1, 20, 500]))
    settled: list[int] = []
    held: list[list[int]] = [[] for _ in range(workers)]
    while not ledger.finished:
        for worker in draw.sample(range(workers), workers):
            held[worker] += ledger.take(worker)
        assert any(held)
        worker = draw.choice([worker for worker in range(workers) if held[worker]])
        position = draw.choice(held[worker])
        if position in poisonous or (draw.random() < 0.05 and len(held[worker]) > 1):
            condemned = ledger.bury(worker, "the signal SIGSEGV")
            held[worker] = []
            if condemned is not None:
                assert condemned in poisonous
                settled.append(condemned)
        else:
            assert ledger.settle(worker, position)
            assert not ledger.settle(worker, position)
            held[worker].remove(position)
            settled.append(position)
    assert sorted(settled) == list(range(len(samples)))
    assert not any(map(ledger.take, range(workers)))


def test_results_travel_whole() -> None:
    random_numbers = np.random.default_rng(0)
    moments = (Moment(0.0, 2.0, 1.0), Moment(2.0, 4.0, 3.0))
    outcomes = Outcomes(
        done=[(7, (), "ab", 4, 3, None), (2, moments, "cd", 8, 6, 4.0)],
        vectors=[random_numbers.random((count, 5), np.float32) for count in (1, 3)],
        failed=[(1, "/a.png", "the file is empty")],
    )
    arrived = pickle.loads(pickle.dumps(outcomes))
    assert (arrived.done, arrived.failed, len(arrived)) == (outcomes.done, outcomes.failed, 3)
    for vectors, sent in zip(arrived.vectors, outcomes.vectors, strict=True):
        np.testing.assert_array_equal(vectors, sent)
    assert len(pickle.loads(pickle.dumps(Outcomes()))) == 0
