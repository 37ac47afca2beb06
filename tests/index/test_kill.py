"""SIGKILL at random points of a build, an append, a compaction, and the making of a search structure.

Whatever was acknowledged is there once, the gallery opens, and search finds what brute force finds. A hundred times:

    COTS_KILLS=100 python -m pytest tests/index/test_kill.py
"""

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from gallery_media import write_animation, write_picture

from cots.model.retrieval_model import RetrievalModel
from index.ann import AnnIndex, Effort
from index.build import build
from index.check import check
from index.engine import open_engine, set_engine
from index.gallery import Gallery, open_gallery
from index.search import Searcher

KILLS = int(os.environ.get("COTS_KILLS", "15"))
SENTENCE = "two dogs on the beach"

# Imports and loads the model once; then forks a build for each line "COUNT SECONDS FILE" and kills it so many seconds
# after it has acknowledged so many items, however quick the machine is. The build commits after every item, so that
# kills fall into commits, and acknowledges each in the file.
SERVER = """
import os, signal, sys, time, warnings
import lancedb
import index.writer
from cots.model.pretrained import load_model
from index.build import build
warnings.simplefilter("ignore")
index.writer.COMMIT_ROWS = 1
source, gallery, model = sys.argv[1], sys.argv[2], load_model(sys.argv[3], device="cpu")
print("ready", flush=True)
for line in sys.stdin:
    count, seconds, path = line.split()
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    child = os.fork()
    if child == 0:
        build([source], gallery, model, batch_size=1, threads=1, progress=lambda step: os.write(file, b"."))
        os._exit(0)
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while os.fstat(file).st_size < int(count) and not os.waitid(os.P_PID, child, ended):
        time.sleep(0.001)
    os.close(file)
    time.sleep(float(seconds))
    os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def vectors_by_path(directory: Path) -> dict[str, np.ndarray]:
    snapshot = open_gallery(directory).snapshot
    paths = np.array(snapshot.rows["path"].to_pylist())
    return {path: snapshot.vectors[paths == path] for path in set(paths.tolist())}


def assert_a_sentence_finds_what_brute_force_finds(directory: Path, model: RetrievalModel, query: np.ndarray) -> None:
    """Each file once, by its best vector, the best ones first. The query is the sentence's vector."""
    scores = {path: float((own @ query).max()) for path, own in vectors_by_path(directory).items()}
    best = sorted(scores.values(), reverse=True)[:5]
    hits = Searcher(open_gallery(directory), model).search(SENTENCE, k=5).hits
    assert len({hit.path for hit in hits}) == len(hits)
    np.testing.assert_allclose([hit.score for hit in hits], best, atol=1e-5)
    np.testing.assert_allclose([scores[hit.path] for hit in hits], best, atol=1e-5)


def assert_vectors_find_what_brute_force_finds(gallery: Gallery, asked: np.ndarray) -> None:
    """All of it when an approximate engine looks everywhere; nearly all as hard as it was tuned to look, which would
    not be so if its rows were mistaken for others. Scores are those of the rows that are named, either way."""
    engine = open_engine(gallery)
    products = asked @ gallery.snapshot.vectors.astype(np.float32).T
    best = np.sort(products, axis=1)[:, ::-1][:, :5]

    def search() -> np.ndarray:
        scores, found = engine.search(asked, 5)
        rows = gallery.snapshot.positions(found.ravel()).reshape(found.shape)
        np.testing.assert_allclose(scores, np.take_along_axis(products, rows, axis=1), atol=1e-5)
        return scores

    if isinstance(engine, AnnIndex):
        assert (search() >= best[:, -1:] - 1e-5).mean() >= 0.95
        engine.effort = Effort(breadth=len(gallery.snapshot), proposals=len(gallery.snapshot))
    np.testing.assert_allclose(search(), best, atol=1e-5)


def test_killed_builds_lose_and_double_nothing(
    tmp_path: Path, tiny_model: RetrievalModel, tiny_model_dir: Path
) -> None:
    photos, gallery = tmp_path / "photos", tmp_path / "gallery"
    query = tiny_model.encode_texts([SENTENCE]).numpy()[0]
    for seed in range(30):
        write_picture(photos / f"{seed:02}.png", seed)
    for seed in range(6):
        write_animation(photos / f"clip{seed}.gif", seed)
    command = [sys.executable, "-c", SERVER, str(photos), str(gallery), str(tiny_model_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    killed = stored = 0
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        for trial in range(KILLS):
            acknowledged = tmp_path / f"acknowledged{trial}"
            before = random.randrange(5)
            # sparing in the first half, which has only so many items to add
            seconds = random.uniform(0, 0.02 if before and trial <= KILLS // 2 else 0.1)
            print(before, seconds, acknowledged, file=server.stdin, flush=True)
            killed += server.stdout.readline() == "-9\n"
            count = len(acknowledged.read_bytes())
            if not (gallery / "manifest.json").exists():
                assert count == 0
                continue
            assert check(gallery, tiny_model) == []
            assert_a_sentence_finds_what_brute_force_finds(gallery, tiny_model, query)
            held = len(vectors_by_path(gallery))
            if trial <= KILLS // 2:
                assert held >= stored + count
            else:
                assert held == 36
            stored = held
            if trial == KILLS // 2:
                build([photos], gallery, tiny_model)
            if trial >= KILLS // 2:  # all is there: change some of it, so that replacements are killed too
                for _ in range(12):
                    write_picture(photos / f"{random.randrange(30):02}.png", random.randrange(10**6))
                write_animation(
                    photos / f"clip{trial % 6}.gif", random.randrange(10**6), seconds=random.choice([9, 20])
                )
        server.stdin.close()
    assert killed > KILLS // 3
    build([photos], gallery, tiny_model)
    build([photos], tmp_path / "undisturbed", tiny_model)
    assert check(gallery, tiny_model) == []
    assert_a_sentence_finds_what_brute_force_finds(gallery, tiny_model, query)
    after, expected = vectors_by_path(gallery), vectors_by_path(tmp_path / "undisturbed")
    assert after.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(after[path], expected[path], atol=2e-3)


# Forks, for each line "SECONDS FILE", a process that changes the gallery without end, and kills it after so many
# seconds. It begins anywhere in the cycle of its four changes, and notes in the file what it does and what is done.
CHANGER = """
import itertools, os, random, signal, sys, time, warnings
import faiss, lancedb
import numpy as np
import pyarrow as pa
from index.build import remove
from index.compaction import compact
from index.engine import set_engine
from index.gallery import open_gallery, schema
from index.lock import writing
warnings.simplefilter("ignore")
directory = sys.argv[1]
def append(count):
    gallery = open_gallery(directory)
    template = gallery.table.search().limit(1).to_arrow().select(gallery.table.schema.names).to_pylist()[0]
    first = gallery.manifest.next_id
    with writing(directory) as place:
        gallery.manifest.with_next_id(first + count).write(place)
        rows = []
        for id in range(first, first + count):
            (place / f"{id}.png").touch()
            vector = np.random.default_rng().standard_normal(32)
            vector = (vector / np.linalg.norm(vector)).astype(np.float16)
            rows.append(template | {"id": id, "item": id, "path": f"{id}.png", "vector": vector})
        gallery.table.add(pa.Table.from_pylist(rows, schema(32)))
    return range(first, first + count)
def add(file):
    for id in append(20):
        print(id, file=file)
def renew(file):
    print("making", file=file)
    made = set_engine(directory, random.choice(["hnsw", "ivf", "ivfpq", "exact"]), recall_target=1)
    print("made", made["engine"], file=file)
def take(file):
    gone = int(open_gallery(directory).snapshot.ids[0])
    print("removing", gone, file=file)
    remove(directory, f"id = {gone}")
    print("removed", gone, file=file)
def shrink(file):
    print("compacting", file=file)
    compact(directory)
    print("compacted", file=file)
print("ready", flush=True)
for line in sys.stdin:
    seconds, path = line.split()
    child = os.fork()
    if child == 0:
        random.seed()
        with open(path, "w", buffering=1) as file:
            steps = [add, renew, take, shrink]
            for step in itertools.islice(itertools.cycle(steps), random.randrange(4), None):
                step(file)
    time.sleep(float(seconds))
    os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_killed_appends_compactions_and_structures_leave_a_gallery_that_answers_rightly(
    tmp_path: Path, tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.ann.FEW_ROWS", 0)
    photos, directory = tmp_path / "photos", tmp_path / "gallery"
    for seed in range(KILLS + 3):  # one may go between two kills
        write_picture(photos / f"{seed:02}.png", seed)
    build([photos], directory, tiny_model)
    set_engine(directory, "ivf", recall_target=1)
    held = set(open_gallery(directory).snapshot.ids.tolist())
    last: list[str] = []
    pipe = subprocess.PIPE
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", CHANGER, str(directory)], stdin=pipe, stdout=pipe, text=True, env=environment
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        for trial in range(KILLS):
            acknowledged = tmp_path / f"changes{trial}"
            print(random.uniform(0.01, random.choice([0.1, 1.0])), acknowledged, file=server.stdin, flush=True)
            assert server.stdout.readline() == "-9\n"
            lines = acknowledged.read_text().split("\n")[:-1] if acknowledged.exists() else []
            last += lines[-1:]
            added = {int(line) for line in lines if line.isdecimal()}
            removed = {int(line.split()[1]) for line in lines if line.startswith("removed")}
            begun = {int(line.split()[1]) for line in lines if line.startswith("removing")}
            assert check(directory) == []  # no row twice, the snapshot is the table
            gallery = open_gallery(directory)
            ids = set(gallery.snapshot.ids.tolist())
            assert (held | added) - begun <= ids
            assert not removed & ids
            held = ids
            asked = np.random.default_rng(trial).choice(gallery.snapshot.vectors.astype(np.float32), 20)
            assert_vectors_find_what_brute_force_finds(gallery, asked)
        server.stdin.close()
    print(Counter(line.split()[0] if not line.isdecimal() else "added" for line in last))  # after what they were killed
