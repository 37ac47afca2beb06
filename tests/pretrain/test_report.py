import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from cots.config import PretrainConfig
from cots.errors import TrainingError
from cots.settings import Settings
from cots.tokenizer_config import VisualTokenizerTrainingConfig
from pretrain.charts import Chart, Series, nice_ticks, tick_labels
from pretrain.report import main, write_report
from pretrain.run_log import read_runs, short_names


def _metrics(recall: float) -> dict[str, float]:
    return {"R@1": recall, "R@5": recall + 20, "R@10": recall + 30, "MedR": 3.0, "MeanR": 9.0}


def _write_run(directory: Path, recalls: tuple[float, ...], **settings: object) -> Path:
    directory.mkdir(parents=True)
    rows: list[dict] = []
    for number, recall in enumerate(recalls, 1):
        step = 10 * number
        rows.append(
            {"step": step, "epoch": number, "seconds": 30.0, "loss": 5 / number, "loss_contrastive": 4 / number}
        )
        both = {"text_to_image": _metrics(recall), "image_to_text": _metrics(recall + 5)}
        rows.append({"step": step, "epoch": number, "seconds": 10.0, "validation": {"data/val-*.tar": both}})
    (directory / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "config.yaml").write_text(yaml.safe_dump({"training": {"batch_size": 64, **settings}}))
    return directory


class _Outline(HTMLParser):
    """Figures by title, the tags that open and close, and everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.titles: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.fetched += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "path", "circle", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._inside == "h3":
            self.titles.append(data.strip())


def _outline(path: Path) -> _Outline:
    outline = _Outline()
    outline.feed(path.read_text(encoding="utf-8"))
    assert outline.open == []
    return outline


def test_a_run_becomes_one_page_that_fetches_nothing(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "first", (10.0, 30.0, 20.0))
    page = write_report([run])
    assert page == run / "report.html"
    outline, text = _outline(page), page.read_text(encoding="utf-8")
    assert {"Loss", "Contrastive", "Text to image", "Image to text"} <= set(outline.titles)
    assert outline.fetched == []
    assert "url(" not in text
    assert "@import" not in text
    assert re.search(r"Best checkpoint</dt><dd>2</dd><dd>epochs, step 20", text)
    assert "1,920" in text  # 30 steps of 64 pairs
    assert "2.0 min" in text  # of training and validation


def test_several_runs_lie_over_each_other_and_only_settings_that_differ_are_listed(tmp_path: Path) -> None:
    runs = [_write_run(tmp_path / name, recalls, seed=0, epochs=epochs) for name, recalls, epochs in (
        ("plain", (10.0, 20.0), 2), ("filtered", (12.0, 25.0), 4))]  # fmt: skip
    main([*map(str, runs), "--out", str(tmp_path / "both.html")])
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    _outline(tmp_path / "both.html")
    figure = next(part for part in text.split("<figure>") if "<h3>Loss" in part)
    assert figure.count('class="line"') == 2
    assert {"plain", "filtered"} <= set(re.findall(r"</i>(\w+)", figure))
    assert "training.epochs" in text
    assert "training.seed" not in text


def _write_tokenizer_run(directory: Path) -> Path:
    rows: list[dict] = []
    for step, error, psnr in ((1, 0.5, 3.01), (2, 0.2, 6.99), (3, 0.3, None)):
        scalars = {"loss": error, "reconstruction_error": error, "kl": 4.0, "kl_batch": 0.5, "kl_weight": 0.0}
        rows.append(
            {"step": step, "epoch": step, **scalars, "revived": 0.0, "seconds": 9.0, "pairs_per_second_per_gpu": 900.0}
        )
        figures = {"reconstruction_error": error, "psnr": psnr, "codebook_usage": 0.625, "codebook_perplexity": 19.1}
        rows.append({"step": step, "epoch": step, "validation": {"val.tar": {"reconstruction": figures}}})
    (directory / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = VisualTokenizerTrainingConfig().model_dump(mode="json")
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    return directory


def test_the_training_of_a_tokenizer_has_its_own_figures(tmp_path: Path) -> None:
    page = write_report([_write_tokenizer_run(tmp_path)])
    titles, text = _outline(page).titles, page.read_text(encoding="utf-8")
    assert {"PSNR", "Codebook usage", "KL weight", "Codes revived", "Pictures per second"} <= set(titles)
    assert "<dt>PSNR</dt><dd>6.99</dd><dd>dB on val.tar</dd>" in text
    assert "<dt>Codebook usage</dt><dd>62.5</dd><dd>% of the codes on val.tar</dd>" in text
    assert "epochs, step 2<" in text
    losses = text.partition("<h2>Losses</h2>")[2].partition("<h2>")[0]
    assert re.findall(r"<h3>([^<]+)<", losses) == [
        "Loss ", "Reconstruction error ", "KL divergence of a patch ", "KL divergence of the batch "]  # fmt: skip
    assert "<h2>Other</h2>" not in text
    assert "pairs" not in text.casefold()
    assert "pictures in 3 steps" in text


def test_reconstructions_at_the_best_checkpoint_are_inside_the_page(tmp_path: Path) -> None:
    run = _write_tokenizer_run(tmp_path)
    (run / "reconstructions").mkdir()
    for step in (1, 2, 3):
        Image.new("RGB", (step, 1)).save(run / "reconstructions" / f"step-{step:08d}.png")
    (source,) = _outline(write_report([run])).fetched
    kind, _, content = source.partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(content) == (run / "reconstructions" / "step-00000002.png").read_bytes()
    (run / "reconstructions" / "step-00000002.png").unlink()
    assert "Reconstructions" not in write_report([run]).read_text(encoding="utf-8")


def test_no_tile_stands_alone_in_a_row(tmp_path: Path) -> None:
    text = write_report([_write_tokenizer_run(tmp_path)]).read_text(encoding="utf-8")
    tiles = text.partition('class="tiles"')[2].partition("</dl>")[0]
    assert tiles.count("<dt>") == 8
    assert re.findall(r"--(wide|narrow):(\d+)", tiles) == [("wide", "4"), ("narrow", "4")]


@pytest.mark.parametrize("kind", [PretrainConfig, VisualTokenizerTrainingConfig])
def test_only_settings_that_are_not_the_default_are_in_ink(tmp_path: Path, kind: type[Settings]) -> None:
    (tmp_path / "log.jsonl").write_text("")
    settings = kind().model_dump(mode="json")
    settings["optimizer"]["weight_decay"] = 0.123
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    text = write_report([tmp_path]).read_text(encoding="utf-8")
    assert re.findall(r'class="changed"><dt>(\w+)', text) == ["weight_decay"]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = read_runs([_write_run(tmp_path / folder / "run", (1.0,)) for folder in ("a", "b")])
    assert [run.name for run in runs] == ["a/run", "b/run"]


def test_sources_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    assert short_names(["a/coco/val.tar", "a/flickr/val.tar", "/test.tar"]) == {
        "a/coco/val.tar": "coco/val.tar", "a/flickr/val.tar": "flickr/val.tar", "/test.tar": "/test.tar"}  # fmt: skip
    assert short_names(["a/b/val.tar", "a/b/val.tar"]) == {"a/b/val.tar": "val.tar"}
    both = {"text_to_image": _metrics(1.0), "image_to_text": _metrics(2.0)}
    row = {"step": 1, "epoch": 1, "validation": {"data/coco/val.tar": both, "data/flickr/val.tar": both}}
    (tmp_path / "log.jsonl").write_text(json.dumps(row) + "\n")
    text = write_report([tmp_path]).read_text(encoding="utf-8")
    assert {"% on coco/val.tar", "% on flickr/val.tar"} <= set(re.findall(r"% on [\w/.]+", text))
    assert "R@1 on coco/val.tar" in text


def test_a_step_taken_again_after_a_stop_counts_once_and_a_broken_row_not_at_all(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "stopped", (1.0,))
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 10, "epoch": 1, "seconds": 30.0, "loss": 7.0}\n{"step": 20, "lo')
    (log,) = read_runs([run])
    assert log.points("loss") == [(10, 7.0)]
    assert log.seconds == 70.0  # what was spent, was spent


def test_a_run_that_has_only_begun_has_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("")
    page = write_report([tmp_path])
    _outline(page)
    assert "<h1>" in page.read_text(encoding="utf-8")
    assert "<svg" not in page.read_text(encoding="utf-8")


def test_a_name_from_outside_is_text_and_not_markup(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run", (1.0,), output="<script>alert(1)</script>")
    assert "<script>alert" not in write_report([run]).read_text(encoding="utf-8")


def test_a_directory_without_a_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"holds no log\.jsonl; give a directory that a training wrote"):
        write_report([tmp_path / "nonesuch"])


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run, page = _write_run(tmp_path / "run", (1.0,)), tmp_path / "nonesuch" / "page.html"
    with pytest.raises(TrainingError, match=r"cannot be written \(.*page\.html: No such file or directory\); give ano"):
        main([str(run), "--out", str(page)])


def test_ticks_are_round_and_enclose_the_values() -> None:
    assert nice_ticks(0, 92, 4) == [0, 25, 50, 75, 100]
    assert nice_ticks(2.61, 7.52, 4)[0] <= 2.61
    assert nice_ticks(2.61, 7.52, 4)[-1] >= 7.52
    assert tick_labels([0, 500_000, 1_000_000]) == ["0", "0.5M", "1M"]
    assert tick_labels([0, 5e-4, 1e-3]) == ["0", "5e&#8722;4", "1e&#8722;3"]


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [float("nan"), 2.0], [-3.0, -3.0], [1e-9, 1e9]])
def test_any_numbers_can_be_drawn(values: list[float]) -> None:
    series = Series("", list(enumerate(values)), "var(--c0)")
    svg = Chart("Loss", "", [series], "steps", str).svg()
    assert "nan" not in svg.partition("<svg")[2]


def test_a_quantity_without_numbers_is_not_drawn() -> None:
    assert Chart("Loss", "", [Series("", [(1, float("nan"))], "var(--c0)")], "steps", str).svg() == ""


@pytest.mark.parametrize("x_high", [1, 40, 1600, 2000, 3840, 9999, 12_000, 2_000_000, 3_100_000_000])
@pytest.mark.parametrize(("x_unit", "character"), [("samples", 6.2), ("samples", 8.5), ("steps", 6.2), ("steps", 8.5)])
def test_labels_of_the_horizontal_axis_do_not_overlap(x_high: int, x_unit: str, character: float) -> None:
    svg = Chart("Loss", "", [Series("", [(0, 1.0), (x_high, 2.0)], "var(--c0)")], x_unit, str).svg()
    *labels, (end, last) = re.findall(r'<text(?: class="last")? x="([\d.]+)" y="210">([^<]+)<', svg)
    begins = [float(x) - character * len(label) / 2 for x, label in labels] + [float(end) - character * len(last)]
    ends = [float(x) + character * len(label) / 2 for x, label in labels]
    assert last.endswith(f" {x_unit}")
    assert all(end < begin for end, begin in zip(ends, begins[1:]))


def test_a_quantity_that_is_always_0_has_an_axis_from_0() -> None:
    svg = Chart("Codes revived", "", [Series("", [(1, 0.0), (2, 0.0)], "var(--c0)")], "steps", str).svg()
    assert re.findall(r'class="y"[^>]*>([^<]+)<', svg) == ["0", "0.25", "0.5", "0.75", "1"]
