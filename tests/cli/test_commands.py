"""Every command and option of the command line, on real media and a tiny model."""

import csv
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from shutil import copytree
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from cots.config import ModelConfig
from cots.model.retrieval_model import RetrievalModel

Cots = Callable[..., Any]
COMMAND = [sys.executable, "-m", "cots.cli"]
HEAVY = (
    "torch",
    "torchvision",
    "transformers",
    "timm",
    "lancedb",
    "faiss",
    "gradio",
    "av",
    "decord",
    "pyarrow",
    "numpy",
)

OPTIONS = {
    "demo": ("--gallery", "--host", "--port"),
    "search": ("WORDS", "--gallery", "-k", "--image", "--without", "--where", "--kind", "--json"),
    "index build": ("SOURCE", "--gallery", "--model"),
    "index remove": ("--gallery", "--where"),
    "index info": ("--gallery", "--json"),
    "index check": ("--gallery",),
    "pretrain": ("CONFIG", "key=value"),
    "evaluate": ("PROTOCOL|FILE.jsonl", "--data", "--model", "--json", "--report", "--list", "--compare"),
    "embed": ("SOURCE", "--out", "--model"),
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_shows_the_options(cots: Cots, command: str) -> None:
    outcome = cots(*command.split(), "--help")
    assert outcome.code == 0
    assert [option for option in OPTIONS[command] if option not in outcome.out] == []
    usage = outcome.out.partition("\n\n")[0]
    assert usage.count("...") == (command in ("search", "index build", "embed", "pretrain"))


def test_importing_and_help_load_nothing_heavy() -> None:
    code = (
        "import sys, cots, cots.cli\n"
        "sys.argv = ['cots', '--help']\n"
        "try: cots.cli.main()\n"
        f"finally: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert [command for command in OPTIONS if command.split()[0] not in done.stdout] == []


@pytest.mark.parametrize(
    "arguments",
    [
        "nonesuch",
        "search",
        "search dog --nonesuch",
        "search dog -k 0",
        "search dog -k many",
        "search dog --kind painting",
        "index build photos",
        "index build --gallery g",
        "index build photos --gallery g --engine flat",
        "index engine flat --gallery g",
        "index remove --gallery g",
        "index nonesuch",
        "embed photos",
        "evaluate",
        "pretrain",
        "demo --port 70000",
    ],
)
def test_wrong_usage_exits_with_2(cots: Cots, arguments: str) -> None:
    outcome = cots(*arguments.split())
    assert (outcome.code, outcome.out) == (2, "")
    assert "Usage:" in outcome.err


def _as_csv(media: Path, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption"])
        writer.writerows([media / "red.png", "a red square"] for _ in range(2))


def _as_parquet(media: Path, path: Path) -> None:
    pq.write_table(pa.table({"path": [str(media / "red.png")], "captions": [["a red square", "red"]]}), path)


@pytest.mark.parametrize(
    ("source", "items"),
    [
        ("{media}", 9),
        ("{media}/red.png", 1),
        ("{media}/clip.mp4", 1),
        ("{media}/*e.png", 2),
        ("{media}/shard.tar", 2),
        ("{media}/items.jsonl", 7),
        ("{tables}/one.csv", 1),
        ("{tables}/one.parquet", 1),
    ],
)
def test_build_takes_every_form_of_source(
    cots: Cots, media: Path, tiny_model_dir: Path, tmp_path: Path, source: str, items: int
) -> None:
    _as_csv(media, tmp_path / "one.csv")
    _as_parquet(media, tmp_path / "one.parquet")
    arguments = (source.format(media=media, tables=tmp_path), "--gallery", tmp_path / "g", "--model", tiny_model_dir)
    outcome = cots("index", "build", *arguments)
    assert outcome.code == 0
    assert f"{items} added" in outcome.out
    assert cots("index", "info", "--gallery", tmp_path / "g", "--json").document["items"] == items


def test_build_brings_up_to_date_and_prunes(cots: Cots, tiny_model_dir: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 40), "red" if name == "a" else "blue").save(photos / f"{name}.png")
    arguments = ("index", "build", photos, "--gallery", tmp_path / "g", "--model", tiny_model_dir, "--batch-size", 1)
    assert "2 added" in cots(*arguments).out
    assert "2 unchanged" in cots(*arguments).out
    Image.new("RGB", (40, 40), "green").save(photos / "c.png")
    (photos / "a.png").unlink()
    kept = cots(*arguments)
    assert "1 added, 1 unchanged" in kept.out
    assert "--prune removes their items" in kept.err
    pruned = cots(*arguments, "--prune")
    assert "1 removed" in pruned.out
    assert "it holds 2 items, 2 vectors." in pruned.out


def test_words_need_no_quotes(cots: Cots, gallery: Path) -> None:
    arguments = ["--gallery", gallery, "--json"]
    together = json.loads(cots("search", "a red square", *arguments).out)["hits"]
    assert json.loads(cots("search", "a", "red", "square", *arguments).out)["hits"] == together


def test_the_version_is_told(cots: Cots) -> None:
    assert cots("--version").out == f"cots {version('cots')}\n"


def test_search_as_json(cots: Cots, gallery: Path, tiny_model: RetrievalModel) -> None:
    outcome = cots("search", "a red square", "--gallery", gallery, "-k", 3, "--json")
    document = outcome.document
    assert outcome.code == 0
    assert outcome.err == ""
    assert list(document) == ["query", "model", "took_ms", "hits"]
    assert document["query"] == "a red square"
    assert document["model"] == tiny_model.name
    assert list(document["took_ms"]) == ["encode", "search", "fetch"]
    assert [hit["rank"] for hit in document["hits"]] == [1, 2, 3]
    promised = {"rank", "score", "path", "kind", "caption", "start", "end"}
    assert {frozenset(hit) for hit in document["hits"]} == {frozenset(promised | {"frame", "id", "source", "licence"})}


def test_search_by_words_and_picture(cots: Cots, gallery: Path, media: Path) -> None:
    def paths(*arguments: object) -> list[str]:
        hits = cots("search", *arguments, "--gallery", gallery, "-k", 7, "--json").document["hits"]
        return [Path(hit["path"]).name for hit in hits]

    assert paths("--image", media / "green.png")[0] == "green.png"
    orders = {
        tuple(paths(*wish)) for wish in (["dog"], ["--image", media / "red.png"], ["dog", "--image", media / "red.png"])
    }
    assert len(orders) == 3
    assert paths("--image", media / "green.png", "--without", "a green square") != []
    score = [
        cots("search", "dog", *without, "--gallery", gallery, "-k", 1, "--json").document["hits"][0]["score"]
        for without in ([], ["--without", "a cat"])
    ]
    assert score[0] != score[1]


def test_search_filters(cots: Cots, gallery: Path) -> None:
    def hits(*arguments: object) -> list[dict]:
        return cots("search", "dog", "--gallery", gallery, *arguments, "--json").document["hits"]

    (video,) = hits("--kind", "video")
    assert (video["kind"], Path(video["path"]).name, video["caption"]) == ("video", "clip.mp4", "many squares")
    assert 0 <= video["start"] <= video["frame"] <= video["end"] <= 9.5
    assert {hit["kind"] for hit in hits("--kind", "image")} == {"image"}
    assert {hit["start"] for hit in hits("--kind", "image")} == {None}
    assert len(hits("--where", "source = 'paints'")) == 6
    assert len(hits("-k", 2)) == 2
    assert hits("--where", "source = 'nonesuch'") == []


def test_search_for_a_person(cots: Cots, gallery: Path) -> None:
    outcome = cots("search", "dog", "--gallery", gallery, "--kind", "video")
    assert "clip.mp4  0:0" in outcome.out
    assert "many squares" in outcome.out
    assert "encode" in outcome.err
    pictures = cots("search", "red", "--gallery", gallery, "--kind", "image", "--mode", "text")
    assert pictures.out.splitlines()[1:] == [" " * 12 + "a red square", " " * 12 + "red"]
    nothing = cots("search", "dog", "--gallery", gallery, "--where", "source = 'nonesuch'")
    assert (nothing.code, nothing.out) == (0, "")
    assert "Nothing in the gallery meets these conditions" in nothing.err
    unsaid = cots("search", "zebra", "--gallery", gallery, "--mode", "text")
    assert (unsaid.code, unsaid.out) == (0, "")
    assert "has a caption with these words; --mode vector" in unsaid.err


def test_an_empty_gallery_is_told_from_conditions_that_nothing_meets(cots: Cots, gallery: Path, tmp_path: Path) -> None:
    copytree(gallery, tmp_path / "empty")
    cots("index", "remove", "--gallery", tmp_path / "empty", "--where", "true")
    outcome = cots("search", "dog", "--gallery", tmp_path / "empty")
    assert (outcome.code, outcome.out) == (0, "")
    assert "empty is empty; fill it: cots index build" in outcome.err


def test_info(cots: Cots, gallery: Path, tiny_model: RetrievalModel) -> None:
    outcome = cots("index", "info", "--gallery", gallery, "--json")
    document = outcome.document
    assert outcome.err == ""
    promised = {"items", "vectors", "images", "videos", "model", "fingerprint", "dimension", "engine", "version"}
    assert promised <= document.keys()
    assert (document["items"], document["images"], document["videos"]) == (7, 6, 1)
    assert document["vectors"] > 7
    assert (document["fingerprint"], document["dimension"]) == (tiny_model.fingerprint, tiny_model.dimension)
    assert "fingerprint" in cots("index", "info", "--gallery", gallery).out


def test_check_and_remove(cots: Cots, media: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    photo, gallery = tmp_path / "photo.png", tmp_path / "g"
    Image.new("RGB", (40, 40), "red").save(photo)
    cots("index", "build", photo, media / "pictures.jsonl", "--gallery", gallery, "--model", tiny_model_dir)
    assert cots("index", "check", "--gallery", gallery).code == 0
    removed = cots("index", "remove", "--gallery", gallery, "--where", "source = 'paints'")
    assert (removed.code, removed.out) == (0, "6 items removed.\n")
    photo.unlink()
    checked = cots("index", "check", "--gallery", gallery)
    assert checked.code == 1
    assert f"1 files are gone: {photo}" in checked.out


def test_embed_writes_parquet(cots: Cots, media: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    outcome = cots("embed", media / "items.jsonl", "--out", tmp_path / "v.parquet", "--model", tiny_model_dir)
    table = pq.read_table(tmp_path / "v.parquet")
    assert outcome.out.startswith(f"{len(table)} vectors of 32 dimensions")
    assert len(set(table["path"].to_pylist())) == 7


def test_evaluate_prints_and_writes(cots: Cots, media: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", media / "pictures.jsonl", "--model", tiny_model_dir, "--batch-size", 2)
    written = cots(*arguments, "--json", tmp_path / "result.json")
    assert written.code == 0
    assert "text to image" in written.out
    document = json.loads((tmp_path / "result.json").read_text())
    assert {"protocol", "model", "images", "captions", "text_to_image", "image_to_text", "RSum"} <= document.keys()
    only = cots(*arguments, "--json", "-").document
    assert only["text_to_image"] == document["text_to_image"]


def test_pretrain_and_use_what_it_wrote(
    cots: Cots, media: Path, tiny_model_config: ModelConfig, vocabulary_file: Path, tmp_path: Path
) -> None:
    model = tiny_model_config.model_dump(mode="json")
    model["text_tower"]["tokenizer"] = str(vocabulary_file)
    values = {
        "model": model,
        "data": {
            "train": [{"path": str(media / "pictures.jsonl")}],
            "validation": [{"path": str(media / "pictures.jsonl")}],
            "workers": 0,
        },
        "training": {"output": str(tmp_path / "run"), "epochs": 3, "batch_size": 2, "device": "cpu"},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    assert cots("pretrain", tmp_path / "tiny.yaml", "training.epochs=1", "training.log_every=1").code == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in steps) == 3
    built = cots("index", "build", media / "red.png", "--gallery", tmp_path / "g", "--model", tmp_path / "run")
    assert "1 added" in built.out
    assert len(cots("search", "dog", "--gallery", tmp_path / "g", "--json").document["hits"]) == 1


def test_demo_serves_the_gallery_where_it_is_told(gallery: Path, tiny_model_dir: Path) -> None:
    arguments = ["demo", "--gallery", gallery, "--host", "127.0.0.1", "--port", "0", "--model", tiny_model_dir]
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("7 items")
        address = process.stdout.readline().split()[3]
        assert urllib.request.urlopen(address).status == 200
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, "")


def test_json_alone_comes_out_of_a_real_process(gallery: Path) -> None:
    arguments = ["search", "a red square", "--gallery", str(gallery), "--json"]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["hits"]) == 7
    assert done.stderr == ""
