import json
import re
from pathlib import Path

import pytest
from dataset_folders import msrvtt_1ka, write_picture

from cots.errors import EvaluationError
from cots.evaluation import examples
from cots.evaluation.comparison import compare
from cots.evaluation.evaluate import EvaluationResult, evaluate, measure
from cots.evaluation.examples import EXAMPLES, RETURNED, pick_examples
from cots.evaluation.protocols import open_protocol
from cots.evaluation.references import REFERENCES
from cots.evaluation.report import write_report
from cots.evaluation.tables import as_markdown, as_text, comparison_text, list_protocols
from cots.model.retrieval_model import RetrievalModel


@pytest.fixture
def photos(tmp_path: Path, tiny_model: RetrievalModel) -> EvaluationResult:
    """Thirty pictures with two captions each, one of them damaged."""
    rows = []
    for number in range(30):
        name = write_picture(tmp_path / "photos" / f"{number:02}.png", number).name
        rows.append({"image": name, "captions": [f"a dog & {'x' * (number % 5)} {number}", f"<b>cat</b> {number}"]})
    (tmp_path / "photos" / "07.png").write_bytes(b"")
    (tmp_path / "photos" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return evaluate(tmp_path / "photos" / "pairs.jsonl", tiny_model, max_bad_share=0.1)


def test_examples_are_the_worst_and_the_best_queries(photos: EvaluationResult) -> None:
    for direction, ranking in photos.rankings.items():
        worst, best = pick_examples(photos, direction)
        readable = [rank for rank in ranking.ranks.tolist() if rank]
        assert worst[0].rank <= max(readable)
        assert [example.rank for example in worst] == sorted((example.rank for example in worst), reverse=True)
        assert all(example.rank == 1 for example in best)
        assert len(worst) == EXAMPLES
        for example in (*worst, *best):
            assert example.item != 7  # unreadable: nothing to show, and no fault of the model's
            assert example.wanted.is_relevant
            scores = [answer.score for answer in example.returned]
            assert scores == sorted(scores, reverse=True)
            assert len(scores) == RETURNED
            shown = [answer.is_relevant for answer in example.returned]
            if example.rank <= RETURNED:
                assert shown.index(True) + 1 == example.rank
            else:
                assert not any(shown)
        assert len({example.item for example in worst}) == EXAMPLES


def test_of_many_best_queries_no_more_than_said_are_looked_at(
    photos: EvaluationResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos.rankings["image_to_text"].ranks[:9] = 1  # eight, as one is unreadable
    photos.rankings["image_to_text"].ranks[9:] = 2
    for looked_at in (3, 5, 20):
        monkeypatch.setattr(examples, "LOOKED_AT", looked_at)
        _, best = pick_examples(photos, "image_to_text")
        assert len(best) == min(looked_at, EXAMPLES)


def test_the_page_stands_alone(photos: EvaluationResult, tmp_path: Path) -> None:
    document = photos.to_json(resamples=50)
    page = write_report(photos, document, tmp_path / "report").read_text()
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"index.html", "report.md", "report.json"}
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert sources
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "&lt;b&gt;cat&lt;/b&gt;" in page or "a dog &amp;" in page
    assert "<b>cat</b>" not in page
    assert "07.png: the file is empty" in page
    assert "1 of the images could not be read and count as never found" in page.partition("Where the wanted")[0]
    assert "uses the whole test set" in page
    for direction in ("text_to_image", "image_to_text"):
        assert f"{document[direction]['R@1']:.1f}" in page
    counts = [int(count) for count in re.findall(r'class="count"[^>]*>(\d+)<', page)]
    assert sum(counts) == 60 + 30  # every query stands in a bar of the two histograms


def test_published_rows_stand_beside_a_protocols_result(tmp_path: Path, tiny_model: RetrievalModel) -> None:
    protocol = msrvtt_1ka(tmp_path)
    result = measure(open_protocol(protocol, tmp_path), tiny_model)
    document = result.to_json(resamples=50)
    page = write_report(result, document, tmp_path / "report").read_text()
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert 'title="video7020"' in page  # which file a picture is of
    for text in (page, markdown):
        assert "MSR-VTT, 1k-A" in text
        assert "12 frames each" in text
        assert "recalled, not re-checked" in text
        assert "zero-shot" in text
        assert "fine-tuned on 9k, re-ranked" in text
        assert "re-ranked means with dual softmax" in text


def test_the_tables_hold_every_figure(photos: EvaluationResult) -> None:
    document = photos.to_json(resamples=50)
    for text in (as_text(document), as_markdown(document)):
        for direction in ("text_to_image", "image_to_text"):
            for name, value in document[direction].items():
                low, high = document["intervals"][direction][name]
                assert f"{value:.1f} [{low:.1f}, {high:.1f}]" in text
        assert f"RSum {document['RSum']:.1f}" in text
        assert "uses the whole test set" in text
        assert "anks are pessimistic: ties count against the model" in text
        assert document["protocol"] in text
        assert "could not be read and count as never found" in text
    assert "\n\n1 item could not be read" in as_markdown(document)


def test_the_list_of_protocols_marks_settings_and_recalled_figures() -> None:
    listed = list_protocols()
    for name in ("flickr30k_1k", "msrvtt_1ka", "activitynet", "a training list", "recalled, not re-checked"):
        assert name in listed
    for model in ("COTS", "CLIP4Clip", "X-CLIP", "CLIP-ViP", "SigLIP 2", "PE core", "InternVideo2"):
        assert model in listed
    for row in REFERENCES:
        (number,) = re.findall(rf"^\[(\d+)\] {re.escape(row.source)}$", listed, re.MULTILINE)
        mark = "" if row.checked else "*"
        assert re.search(
            rf"^  {re.escape(row.model)} .* {row.conditions} \[{number}\]{re.escape(mark)}$", listed, re.MULTILINE
        )


def test_a_protocol_is_listed_alone_with_its_own_sources() -> None:
    listed = list_protocols("msrvtt_full")
    assert listed.count("  needs ") == 1
    assert len(re.findall(r"^\[\d+\] ", listed, re.MULTILINE)) == 2
    assert "What others reported" in listed
    assert "What others reported" not in list_protocols("msrvtt_9k")  # a training list has no results


def test_a_comparison_of_two_models(
    photos: EvaluationResult, tmp_path: Path, tiny_model: RetrievalModel, other_model: RetrievalModel
) -> None:
    file = tmp_path / "photos" / "pairs.jsonl"
    for name, model in (("a", tiny_model), ("b", other_model)):
        document = evaluate(file, model, max_bad_share=0.1).to_json(resamples=50)
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    comparison = compare(tmp_path / "a.json", tmp_path / "b.json")
    before, after = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    for direction in ("text_to_image", "image_to_text"):
        for name in ("R@1", "R@5", "R@10", "MedR", "MeanR", "mAP@10"):
            one = comparison.directions[direction][name]
            assert one.value == pytest.approx(after[direction][name] - before[direction][name], abs=1e-3)
            assert one.interval[0] <= one.value <= one.interval[1]
            assert 0 <= one.p_value <= 1
    assert comparison.rsum.value == pytest.approx(after["RSum"] - before["RSum"])
    assert comparison.notes == ()
    assert tiny_model.fingerprint[:12] in comparison_text(comparison)
    same = compare(tmp_path / "a.json", tmp_path / "a.json")
    assert same.directions["text_to_image"]["R@1"].interval == (0.0, 0.0)
    assert same.notes == ("both results are of one model",)


def test_a_comparison_says_what_else_than_the_model_differs(photos: EvaluationResult, tmp_path: Path) -> None:
    document = photos.to_json(resamples=10)
    (tmp_path / "a.json").write_text(json.dumps(document))
    changed = document | {"fingerprint": "another", "image_size": 224, "decode_failures": []}
    (tmp_path / "b.json").write_text(json.dumps(changed))
    text = comparison_text(compare(tmp_path / "a.json", tmp_path / "b.json"))
    assert "note: pixels a side: 64 in the first, 224 in the second" in text
    assert "note: items that could not be read: 1 in the first, 0 in the second" in text


def test_a_result_without_precision_is_compared_but_for_its_map(photos: EvaluationResult, tmp_path: Path) -> None:
    document = photos.to_json(resamples=10)
    (tmp_path / "a.json").write_text(json.dumps(document))
    for side in ("text_to_image", "image_to_text"):
        del document["queries"][side]["precision"]
    (tmp_path / "b.json").write_text(json.dumps(document))
    for pair in (("a.json", "b.json"), ("b.json", "a.json")):
        figures = compare(*(tmp_path / name for name in pair)).directions["text_to_image"]
        assert list(figures) == ["R@1", "R@5", "R@10", "MedR", "MeanR"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"ranks": None}, "ranks of .*b.json are damaged"),
        ({"ranks": [1, 2]}, "a unit from 0 of every query"),
        ({"ranks": [0] * 60}, "not a rank from 1"),
        ({"precision": [0.5]}, "not a precision of every query"),
        ({"units": [7] * 60}, "a unit without a query"),
        ({"units": list(range(60))}, "not about the same captions"),
    ],
)
def test_a_damaged_result_is_refused(
    damage: dict[str, object], message: str, photos: EvaluationResult, tmp_path: Path
) -> None:
    document = photos.to_json(resamples=10)
    (tmp_path / "a.json").write_text(json.dumps(document))
    document["queries"]["text_to_image"] |= damage
    (tmp_path / "b.json").write_text(json.dumps(document))
    with pytest.raises(EvaluationError, match=message):
        compare(tmp_path / "a.json", tmp_path / "b.json")


@pytest.mark.parametrize("damage", [{"decode_failures": "none"}, {"decode_failures": [{}]}, {"fingerprint": None}])
def test_damaged_facts_of_a_result_are_refused(
    damage: dict[str, object], photos: EvaluationResult, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(photos.to_json(resamples=10) | damage))
    with pytest.raises(EvaluationError, match=r"The model or the failures of .* are damaged"):
        compare(tmp_path / "a.json", tmp_path / "a.json")


@pytest.mark.parametrize("gone", ["protocol", "fingerprint", "decode_failures"])
def test_a_part_of_a_result_is_refused(gone: str, photos: EvaluationResult, tmp_path: Path) -> None:
    document = photos.to_json(resamples=10)
    del document[gone]
    (tmp_path / "part.json").write_text(json.dumps(document))
    with pytest.raises(EvaluationError, match=f"part of a result: it has no {gone}"):
        compare(tmp_path / "part.json", tmp_path / "part.json")


def test_results_that_cannot_be_compared(photos: EvaluationResult, tmp_path: Path, tiny_model: RetrievalModel) -> None:
    (tmp_path / "a.json").write_text(json.dumps(photos.to_json(resamples=10)))
    rows = (tmp_path / "photos" / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "photos" / "fewer.jsonl").write_text("".join(rows[10:]))
    fewer = evaluate(tmp_path / "photos" / "fewer.jsonl", tiny_model).to_json(resamples=10)
    (tmp_path / "fewer.json").write_text(json.dumps(fewer))
    with pytest.raises(EvaluationError, match="not about the same captions"):
        compare(tmp_path / "a.json", tmp_path / "fewer.json")
    (tmp_path / "other.json").write_text('{"R@1": 5}')
    with pytest.raises(EvaluationError, match=r"other\.json is no result"):
        compare(tmp_path / "a.json", tmp_path / "other.json")
    (tmp_path / "other.json").write_text("no")
    with pytest.raises(EvaluationError, match="is not JSON"):
        compare(tmp_path / "other.json", tmp_path / "a.json")
    with pytest.raises(EvaluationError, match="cannot be read"):
        compare(tmp_path / "none.json", tmp_path / "a.json")


def test_a_report_that_cannot_be_written(photos: EvaluationResult, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(EvaluationError, match="cannot be written to"):
        write_report(photos, photos.to_json(resamples=10), tmp_path / "taken")


@pytest.fixture
def other_model(tiny_model_dir: Path, tmp_path: Path) -> RetrievalModel:
    """The tiny model with another image projection."""
    import torch

    from cots.model.model_directory import read_model, save_model
    from cots.model.pretrained import load_model

    encoder, tokenizer, _ = read_model(tiny_model_dir)
    torch.nn.init.normal_(encoder.image_projection.linear.weight)
    save_model(tmp_path / "other", encoder, tokenizer)
    return load_model(str(tmp_path / "other"), device="cpu")
