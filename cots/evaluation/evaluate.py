"""Text-to-image and text-to-video retrieval, both ways.

    cots evaluate pairs.jsonl --model runs/mine --json result.json

    result = evaluate("pairs.jsonl", load_model("runs/mine"))
    result = measure(open_protocol("msrvtt_1ka", "data/msrvtt"), model)

An item that cannot be read stays a candidate that is never found: its captions count as misses, and it is named in
the result. Past a share of such items (default 1 %) the evaluation ends with an error, for its figures would mean
little.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cots.embed import Progress, embed
from cots.errors import EvaluationError, MediaError
from cots.evaluation.bootstrap import LEVEL, RESAMPLES, Interval, Queries, intervals
from cots.evaluation.evaluation_set import EvaluationSet, read_evaluation_set
from cots.evaluation.media_folder import some
from cots.evaluation.metrics import Ranking, recall_sum, summary
from cots.evaluation.normalisation import NORMALISATIONS, USES_THE_WHOLE_TEST_SET
from cots.evaluation.scoring import Vectors, rank_directions
from cots.model.retrieval_model import RetrievalModel
from cots.stopwatch import Stopwatch

Directions = dict[str, dict[str, float]]

MAX_BAD_SHARE = 0.01
TEXT_BATCH = 256
SEED = 0
_PACKAGES = (
    "cots",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "numpy",
    "pillow",
    "av",
    "decord2",
    "open_clip_torch",
)


@dataclass
class EvaluationResult:
    """Attributes:
    test_set: what was evaluated.
    model, fingerprint, image_size, device: of what, and where.
    rankings: {"text_to_KIND": Ranking, "KIND_to_text": Ranking}.
    normalised: the same after each of NORMALISATIONS, by its name.
    vectors: that were ranked.
    failures: the items that could not be read, with the reason; they count as never found.
    seconds: of work on "decoding", "encoding" (these two overlap and are added up over threads), "captions",
        "scoring"; "total" is what a clock shows.
    """

    test_set: EvaluationSet
    model: str
    fingerprint: str
    image_size: int
    device: str
    rankings: dict[str, Ranking]
    normalised: dict[str, dict[str, Ranking]]
    vectors: Vectors
    failures: dict[str, str]
    seconds: dict[str, float]
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def kind(self) -> str:
        return self.test_set.kind

    @property
    def directions(self) -> Directions:
        """{"text_to_KIND": metrics, "KIND_to_text": metrics}; see `retrieval_metrics`."""
        return {name: summary(ranking) for name, ranking in self.rankings.items()}

    def queries(self) -> dict[str, Queries]:
        """What a bootstrap resamples: whole items, and of items of one label all together."""
        labels = self.test_set.labels
        units = {f"text_to_{self.kind}": labels[self.test_set.owner], f"{self.kind}_to_text": labels}
        return {
            name: Queries(ranking.ranks.numpy(), units[name].numpy(), ranking.precision.numpy())
            for name, ranking in self.rankings.items()
        }

    def to_json(self, resamples: int = RESAMPLES) -> dict[str, Any]:
        """The document that `cots evaluate --json` writes; docs/evaluation.md says what each key holds."""
        queries = self.queries()
        around, around_sum = intervals(queries, resamples=resamples, seed=SEED)
        return {
            "protocol": self.test_set.protocol,
            "model": self.model,
            "fingerprint": self.fingerprint,
            f"{self.kind}s": len(self.test_set.items),
            "captions": len(self.test_set.captions),
            **self.directions,
            "RSum": recall_sum(*self.directions.values()),
            "intervals": {
                **{name: _rounded(figures) for name, figures in around.items()},
                "RSum": _rounded({"RSum": around_sum})["RSum"],
                "level": LEVEL,
                "method": f"bootstrap over {self._units()}, each with its captions; {resamples} resamples, seed {SEED}",
            },
            "normalised": {
                "note": USES_THE_WHOLE_TEST_SET,
                **{
                    name: {direction: summary(ranking) for direction, ranking in rankings.items()}
                    for name, rankings in self.normalised.items()
                },
            },
            "frames": self._frames(),
            "until": self.test_set.frames.until if self.kind == "video" else None,
            "image_size": self.image_size,
            "folds": self.test_set.folds,
            "decode_failures": [{"path": path, "reason": reason} for path, reason in self.failures.items()],
            "warnings": list(self.test_set.warnings),
            "seconds": {name: round(seconds, 3) for name, seconds in self.seconds.items()},
            "versions": {"python": platform.python_version()} | versions(),
            "device": self.device,
            "date": self.date,
            "queries": {
                "digest": self.test_set.digest,
                **{
                    name: {
                        "ranks": side.ranks.tolist(),
                        "precision": [round(value, 6) for value in self.rankings[name].precision.tolist()],
                        "units": side.units.tolist(),
                    }
                    for name, side in queries.items()
                },
            },
        }

    def _units(self) -> str:
        """What the bootstrap draws: "1,000 videos", or "64 groups of 112 videos"."""
        items, groups = len(self.test_set.items), len(self.test_set.labels.unique())
        return f"{items:,} {self.kind}s" if groups == items else f"{groups:,} groups of {items:,} {self.kind}s"

    def _frames(self) -> str | int | None:
        if self.kind == "image":
            return None
        return self.test_set.frames.count or "one a second"


def evaluate(
    file: str | Path,
    model: RetrievalModel,
    *,
    max_bad_share: float = MAX_BAD_SHARE,
    batch_size: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> EvaluationResult:
    """Measure retrieval both ways over the items of a file.

    Args:
        file: as `read_evaluation_set`.
        model, max_bad_share, batch_size, progress: as `measure`.

    Raises:
        SourceError, EvaluationError: as `read_evaluation_set` and `measure`.
    """
    test_set = read_evaluation_set(file)
    return measure(test_set, model, max_bad_share=max_bad_share, batch_size=batch_size, progress=progress)


def measure(
    test_set: EvaluationSet,
    model: RetrievalModel,
    *,
    max_bad_share: float = MAX_BAD_SHARE,
    batch_size: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> EvaluationResult:
    """Embed the items and captions of a set, and rank each for each.

    Args:
        test_set: what to evaluate.
        model: what embeds them.
        max_bad_share: share of unreadable items above which the evaluation fails.
        batch_size: pictures encoded at once; by default what suits the device.
        progress: called after each item.

    Raises:
        EvaluationError: the model cannot embed videos, too many items are unreadable, or a vector is not finite.
    """
    if test_set.kind == "video" and not model.handles_video:
        raise EvaluationError(f"The model {model.name} embeds images only; {test_set.protocol} needs one for videos.")
    started = time.perf_counter()
    stopwatch = Stopwatch()
    problems: list[MediaError] = []
    samples = [item.sample for item in test_set.items if item.sample is not None]
    embedded = embed(
        samples,
        model,
        on_error=problems.append,
        batch_size=batch_size,
        total=len(samples),
        progress=progress,
        frames=test_set.frames,
        stopwatch=stopwatch,
    )
    found = {item.sample.path: torch.from_numpy(item.vectors[0]) for item in embedded}
    failures = _failures(test_set, found, problems, max_bad_share)
    with stopwatch.measure("captions"):
        texts = _encode_captions(test_set.captions, model)
    nothing = torch.zeros(model.dimension)
    vectors = [found.get(item.sample.path, nothing) if item.sample else nothing for item in test_set.items]
    everything = Vectors(texts, torch.stack(vectors), torch.tensor([item.name in failures for item in test_set.items]))
    with stopwatch.measure("scoring"):
        rankings = rank_directions(everything, test_set)
        normalised = {name: rank_directions(everything, test_set, method) for name, method in NORMALISATIONS.items()}
    return EvaluationResult(
        test_set,
        model.name,
        model.fingerprint,
        model.image_size,
        _device_name(model.device),
        rankings,
        normalised,
        everything,
        failures,
        dict(stopwatch.seconds) | {"total": time.perf_counter() - started},
    )


def versions() -> dict[str, str]:
    """Versions of the packages that can change a result, of those that are installed."""
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _failures(
    test_set: EvaluationSet, found: dict[str, Tensor], problems: list[MediaError], max_bad_share: float
) -> dict[str, str]:
    """Why items have no vector, by their names."""
    reasons = {error.path: error.reason for error in problems}
    failures: dict[str, str] = {}
    for item in test_set.items:
        if item.sample is None:
            failures[item.name] = item.problem
        elif item.sample.path not in found:
            failures[item.name] = reasons.get(item.sample.path, item.problem)
    if len(failures) > max_bad_share * len(test_set.items):
        named = some((f"{name}: {reason}" for name, reason in failures.items()), between="; ")
        raise EvaluationError(
            f"{len(failures)} of {len(test_set.items)} items of {test_set.protocol} cannot be read, more than "
            f"{100 * max_bad_share:.3g}%: {named}. Mend them, or allow more with --max-failures."
        )
    return failures


def _encode_captions(captions: list[str], model: RetrievalModel) -> Tensor:
    """(T, D) float32, unit norm."""
    batches = [captions[start : start + TEXT_BATCH] for start in range(0, len(captions), TEXT_BATCH)]
    return torch.cat([model.encode_texts(batch) for batch in batches])


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


def _rounded(figures: dict[str, Interval]) -> dict[str, list[float]]:
    return {name: [round(low, 3), round(high, 3)] for name, (low, high) in figures.items()}
