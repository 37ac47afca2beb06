"""A run directory read back: its settings, where it ran, the rows of its log and what the numbers in them mean."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cots.config import PretrainConfig
from cots.errors import TrainingError
from cots.tokenizer_config import SECTION, VisualTokenizerTrainingConfig
from pretrain.validation import Metrics, criterion


class Quantity(NamedTuple):
    """How a number of the log is shown.

    Attributes:
        unit: "" if it has none; one that begins with % is shown to one decimal.
        factor: from the log to the unit.
        from_zero: whether its axis begins at 0.
        top: where its axis ends; None: above the largest value.
    """

    title: str
    unit: str = ""
    factor: float = 1
    from_zero: bool = True
    top: float | None = None


FIGURES: dict[str, Quantity] = {  # of a tokenizer's validation
    "reconstruction_error": Quantity("Reconstruction error", "MSE"),
    "psnr": Quantity("PSNR", "dB", from_zero=False),
    "codebook_usage": Quantity("Codebook usage", "% of the codes", factor=100, top=100.0),
    "codebook_perplexity": Quantity("Codebook perplexity", "codes"),
}
QUANTITIES: dict[str, dict[str, Quantity]] = {  # by section and name in the log
    "Losses": {
        "loss": Quantity("Loss", "sum", from_zero=False),
        "reconstruction_error": FIGURES["reconstruction_error"],
        "kl": Quantity("KL divergence of a patch", "nats"),
        "kl_batch": Quantity("KL divergence of the batch", "nats"),
    },
    "Optimisation": {
        "learning_rate": Quantity("Learning rate"),
        "learning_rate_image_tower": Quantity("Learning rate", "image tower"),
        "learning_rate_text_tower": Quantity("Learning rate", "text tower"),
        "rate_factor": Quantity("Learning rate", "share of its peak", top=1.0),
        "gradient_norm": Quantity("Gradient norm", "before clipping"),
        "kl_weight": Quantity("KL weight"),
        "revived": Quantity("Codes revived", "per step"),
        "temperature": Quantity("Temperature"),
        "positive_similarity": Quantity("Similarity of pairs", "cosine"),
        "negative_similarity": Quantity("Similarity of negatives", "cosine"),
        "queue_fill": Quantity("Queue fill", "%", factor=100, top=100.0),
        "filter_kept": Quantity("Pairs kept by the filter", "%", factor=100, top=100.0),
        "filter_threshold": Quantity("Filter threshold", "cosine", from_zero=False),
        "filter_two_hills": Quantity("Filter found wrong pairs", "% of the steps", factor=100, top=100.0),
        "direction_agreement": Quantity("Agreement of the directions", "%", factor=100),
        "masked_image_accuracy": Quantity("Masked-patch accuracy", "%", factor=100),
        "masked_text_accuracy": Quantity("Masked-word accuracy", "%", factor=100),
    },
    "Speed": {
        "pairs_per_second_per_gpu": Quantity("Pairs per second", "per device"),
        "mfu": Quantity("Model FLOPs utilisation", "% of the matrix rate", factor=100),
        "data_wait": Quantity("Waiting for data", "% of the time", factor=100),
        "peak_memory_gib": Quantity("Peak memory", "GiB"),
    },
}


@dataclass
class Validated:
    """Figures after a step: {source: {direction: metrics}}; a tokenizer's have one direction, `reconstruction`."""

    step: int
    epoch: float
    results: dict[str, Metrics]

    @property
    def merit(self) -> float:
        """What the best checkpoint has most of: recall, or of a tokenizer the negated reconstruction error."""
        figures = [metrics for directions in self.results.values() for metrics in directions.values()]
        if all("R@1" in metrics for metrics in figures):
            return criterion(self.results)
        return -sum(metrics["reconstruction_error"] for metrics in figures)


@dataclass
class RunLog:
    """A run as its directory tells it.

    Attributes:
        directory: where it is.
        name: what tells it from the runs that it is shown with.
        settings: config.yaml; empty if there is none.
        starts: what run.json says of every start.
        rows: training rows in the order of their steps; of a step that was taken again after a stop, the last one.
        validated: in the order of their steps.
        seconds: of training and validation, repeated steps included; 0 if the log does not say.
    """

    directory: Path
    name: str
    settings: dict[str, Any]
    starts: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    validated: list[Validated] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def batch_size(self) -> int | None:
        """Pairs or pictures a step, of all ranks."""
        return self.settings.get("training", {}).get("batch_size")

    @property
    def of_tokenizer(self) -> bool:
        """Whether a visual tokenizer was trained."""
        return SECTION in self.settings

    @property
    def batch_of(self) -> str:
        """What a batch is counted in."""
        return "pictures" if self.of_tokenizer else "pairs"

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings of such a training where its configuration says nothing."""
        kind = VisualTokenizerTrainingConfig if self.of_tokenizer else PretrainConfig
        return kind().model_dump(mode="json")

    @property
    def ranks(self) -> int:
        return self.starts[-1]["ranks"] if self.starts else 1

    @property
    def steps(self) -> int:
        """Steps taken."""
        return max([row["step"] for row in self.rows] + [done.step for done in self.validated], default=0)

    @property
    def best(self) -> Validated | None:
        """The validation that the best checkpoint was chosen by."""
        return max(self.validated, key=lambda done: done.merit, default=None)

    @property
    def reconstructions(self) -> Path | None:
        """The sheet of pictures and their reconstructions at the best checkpoint, if a tokenizer's training left it."""
        path = self.directory / "reconstructions" / f"step-{self.best.step:08d}.png" if self.best else None
        return path if path and path.is_file() else None

    def points(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a scalar, where it is a number."""
        return [(row["step"], row[name]) for row in self.rows if isinstance(row.get(name), int | float)]


def read_runs(directories: list[Path]) -> list[RunLog]:
    """Read runs, named by the last parts of their paths that differ.

    Raises:
        TrainingError: a directory holds no log.
    """
    names = short_names(str(directory.resolve()) for directory in directories)
    return [_read_run(directory, names[str(directory.resolve())]) for directory in directories]


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """What to call each of some paths: as many of its last parts as tell all of them apart.

    Of coco/val.tar and flickr/val.tar it takes two, of coco/val.tar alone one.
    """
    parts = {path: Path(path).parts for path in paths}
    depth, longest = 1, max((len(own) for own in parts.values()), default=1)
    while depth < longest and len({own[-depth:] for own in parts.values()}) < len(parts):
        depth += 1
    return {path: str(Path(*own[-depth:])) for path, own in parts.items()}


def _read_run(directory: Path, name: str) -> RunLog:
    try:
        lines = (directory / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise TrainingError(f"{directory} holds no log.jsonl; give a directory that a training wrote.") from error
    log = RunLog(directory, name, _settings(directory / "config.yaml"), _starts(directory / "run.json"))
    rows: dict[int, dict[str, Any]] = {}
    validated: dict[int, Validated] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the row that a killed run was writing
            continue
        log.seconds += row.get("seconds", 0.0)
        if "validation" not in row:
            rows[row["step"]] = row
        elif row["validation"]:
            validated[row["step"]] = Validated(row["step"], row["epoch"], row["validation"])
    log.rows = [rows[step] for step in sorted(rows)]
    log.validated = [validated[step] for step in sorted(validated)]
    return log


def figure(name: str) -> Quantity:
    """What a figure of a tokenizer's validation is; one that is not known goes by its name in the log."""
    return FIGURES.get(name, Quantity(words(name), from_zero=False))


def words(name: str) -> str:
    """A name in the log as a title."""
    return name.replace("_", " ").capitalize()


def _settings(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _starts(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["starts"] if path.is_file() else []
