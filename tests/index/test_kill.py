"""SIGKILL at random points of a build: what was committed is there once, and the next build goes on from it."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
from gallery_media import write_animation, write_picture

from cots.model.retrieval_model import RetrievalModel
from index.build import build
from index.check import check
from index.gallery import open_gallery

KILLS = 15

# Imports and loads the model once; then forks a build for each line "SECONDS FILE" and kills it after so many seconds.
# The build commits after every item, so that kills fall into commits, and acknowledges each in the file.
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
    seconds, path = line.split()
    child = os.fork()
    if child == 0:
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        build([source], gallery, model, batch_size=1, workers=1, progress=lambda step: os.write(file, b"."))
        os._exit(0)
    time.sleep(float(seconds))
    os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def vectors_by_path(directory: Path) -> dict[str, np.ndarray]:
    snapshot = open_gallery(directory).snapshot
    paths = np.array(snapshot.rows["path"].to_pylist())
    return {path: snapshot.vectors[paths == path] for path in set(paths.tolist())}


def test_killed_builds_lose_and_double_nothing(
    tmp_path: Path, tiny_model: RetrievalModel, tiny_model_dir: Path
) -> None:
    photos, gallery = tmp_path / "photos", tmp_path / "gallery"
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
            print(random.uniform(0.02, 0.4), acknowledged, file=server.stdin, flush=True)
            killed += server.stdout.readline() == "-9\n"
            count = len(acknowledged.read_bytes()) if acknowledged.exists() else 0
            if not (gallery / "manifest.json").exists():
                assert count == 0
                continue
            assert check(gallery, tiny_model) == []
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
    after, expected = vectors_by_path(gallery), vectors_by_path(tmp_path / "undisturbed")
    assert after.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(after[path], expected[path], atol=2e-3)
