"""What every training is: a loop over steps that logs, validates, saves, ends when it is told to, and goes on later."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor, nn

from cots.config import PretrainConfig
from cots.errors import ConfigError, TrainingError
from cots.tokenizer_config import VisualTokenizerTrainingConfig
from pretrain.checkpoint import (
    FORMAT,
    checkpoint_to_resume,
    random_state,
    read_checkpoint,
    refuse_other_format,
    refuse_other_items,
    refuse_other_training,
    restore_random_state,
    save_checkpoint,
    writing_to,
)
from pretrain.determinism import deterministic_arithmetic
from pretrain.distributed import (
    Ranks,
    StopRequest,
    ending_at_sigterm,
    lost_another_rank,
    process_group,
    sum_over_ranks,
)
from pretrain.loader import StepSampler
from pretrain.optimizer import rate_factor
from pretrain.pair_sources import name_of, open_source
from pretrain.report import write_report
from pretrain.step_trace import StepTrace
from pretrain.telemetry import Telemetry, no_number
from pretrain.unusable import name_left_out, too_many

# settings that affect neither weights nor the order of samples, and so may change on resuming
_FREE_ON_RESUMING: dict[str, set[str]] = {
    "start": {"image_tower", "text_tower", "model"},
    "data": {"workers", "validation", "max_bad_share"},
    "training": {
        "output", "resume", "device", "compile", "activation_checkpointing", "log_every", "validate_every",
        "validate_steps", "checkpoint_every", "checkpoint_steps", "keep_checkpoints", "weights_dtype", "tensorboard",
        "wandb", "trace_step", "deterministic",
    },
}  # fmt: skip


class Samples(Protocol):
    """A rank's part of a step.

    Attributes:
        numbers: of the items among all of all sources.
        bad: names and reasons of those that could not be read, and were replaced by others.
    """

    numbers: list[int]
    bad: list[tuple[str, str]]


Config = TypeVar("Config", PretrainConfig, VisualTokenizerTrainingConfig)
Step = TypeVar("Step", bound=Samples)


class TrainingRun(ABC, Generic[Config, Step]):
    """A training as configured. A kind of training says how its samples are read, what a step does with them, how it is
    validated, and what of its state a checkpoint holds.

    A kind's constructor calls, in this order: this one, `_open_sources`, and once its networks stand `_begin`.

    Attributes:
        directory: of the run.
        checkpoint: what the run goes on from, if anything.
        sources, sampler: the training sources, and which of their items are whose in each step.
        epochs, steps: how its samples are cut, and how many steps there are.
        step: how many have been taken.
        samples_read, samples_bad: of this rank.
        items_since_log: what it took in each step since the last row of the log.
        best: `criterion`, `step` and `results` of the validation that was best.
    """

    worst: float
    """A criterion that any validation beats."""

    def __init__(self, config: Config, ranks: Ranks, parts: int = 1) -> None:
        training = config.training
        if training.batch_size % (ranks.count * parts):
            factors = [f"{ranks.count} ranks"] * (ranks.count > 1) + [f"{parts} accumulation parts"] * (parts > 1)
            raise ConfigError(f"training.batch_size {training.batch_size} is not divisible by {' x '.join(factors)}.")
        self.config: Config = config
        self.ranks, self.device = ranks, ranks.device
        self.directory = Path(training.output)
        self.checkpoint = checkpoint_to_resume(self.directory, training.resume)
        self.step = self.samples_read = self.samples_bad = 0
        self.best: dict[str, Any] = {"criterion": self.worst, "step": -1}
        self.items_since_log: list[list[int]] = []
        self._before: dict[str, Any] | None = None
        self._ranks_before = ranks.count

    def _open_sources(self) -> None:
        """Open the training sources, and the checkpoint, which is refused if it is of another training."""
        data, training = self.config.data, self.config.training
        if not data.train:
            raise ConfigError("data.train names no source; give one, such as data.train=train.tar.")
        self.sources = [open_source(source) for source in data.train]
        self.sampler = StepSampler(
            [len(source) for source in self.sources],
            [source.weight for source in data.train],
            training.batch_size,
            training.seed,
            self.ranks.rank,
            self.ranks.count,
        )
        self.epochs = self.sampler.epochs
        self.steps = self.epochs.steps(training.epochs)
        if self.checkpoint is not None:
            self._before = read_checkpoint(self.checkpoint)
            before, now = self._as_now(self._before["config"]), self.config.model_dump(mode="json")
            refuse_other_format(self.checkpoint, self._before)
            refuse_other_training(self.checkpoint, before, now, _FREE_ON_RESUMING)
            refuse_other_items(self.checkpoint, self._before.get("items"), self.epochs.lengths)

    def _begin(self) -> None:
        """Stand where the first step begins, or the checkpoint ended; from here on ranks draw different numbers."""
        torch.manual_seed(self.config.training.seed + 1 + self.ranks.rank)
        if self._before is not None:
            self._restore(self._before)
            self._before = None
        if self.ranks.first:
            self.directory.mkdir(parents=True, exist_ok=True)
            written = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
            (self.directory / "config.yaml").write_text(written)
        self.telemetry = Telemetry(self.config, self.ranks, self.steps, self.step)

    @property
    @abstractmethod
    def trained(self) -> nn.Module:
        """What is put into training mode."""

    @abstractmethod
    def _introduction(self) -> str: ...

    @abstractmethod
    def _samples(self) -> Iterator[Step]:
        """The samples of every step that is left."""

    @abstractmethod
    def _take(self, samples: Step) -> tuple[dict[str, Tensor], float]:
        """Train on a step's samples; what the log has of it, and its floating-point operations (0: not counted)."""

    @abstractmethod
    def _validate(self) -> None:
        """Measure, and keep what is best; called at the last step, and as often as the settings say."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the run's own; every rank is asked, the first one's is written."""

    @abstractmethod
    def _restore_state(self, state: dict[str, Any]) -> None: ...

    @abstractmethod
    def _outcome(self) -> str:
        """Where what was trained is, for the last line."""

    def train(self) -> None:
        """Take every step that is left, or those until SIGTERM."""
        training = self.config.training
        self.telemetry.say(self._introduction())
        if self._ranks_before != self.ranks.count:
            processes = "1 process" if self.ranks.count == 1 else f"{self.ranks.count} processes"
            self.telemetry.say(
                f"Resuming with {processes} instead of {self._ranks_before}: the order of samples is unchanged; what "
                "each process draws for itself, such as dropout, is drawn anew."
            )
        name_left_out(self.sources, self.config.data.max_bad_share, self.telemetry.say)
        if training.resume and self.step == 0:
            self.telemetry.say(f"{self.directory} holds no checkpoint to resume from; this run begins with step 1.")
        with ending_at_sigterm():
            steps = self._samples()
        if training.trace_step and not self.step < training.trace_step <= self.steps:
            self.telemetry.say(
                f"No step is traced: training.trace_step={training.trace_step} is not among the steps to come."
            )
        traced_from = training.trace_step if self.ranks.first else 0
        trace = StepTrace(self.directory, traced_from, self.device, self.telemetry.say)
        with StopRequest(self.ranks) as stop, trace:
            self.trained.train()
            self.telemetry.restart()
            while self.step < self.steps:
                asked = time.perf_counter()
                samples = next(steps)
                waited = time.perf_counter() - asked
                self.items_since_log.append(samples.numbers)
                self.samples_read += len(samples.numbers)
                self.samples_bad += len(samples.bad)
                self.telemetry.name_bad(samples.bad, alike=False)
                self._refuse_too_many_bad(self.samples_bad, self.samples_read, samples.bad)
                trace.before(self.step + 1)
                scalars, flops = self._take(samples)
                self.telemetry.step(scalars, waited, flops)
                self.step += 1
                trace.after()
                last, stopping = self.step == self.steps, stop.requested()
                validating = last or self._due(training.validate_every, training.validate_steps)
                saving = last or stopping or self._due(training.checkpoint_every, training.checkpoint_steps)
                # A row before each checkpoint: a run that goes on from it begins the next row as one that was not
                # stopped does, and no weights are saved that are no numbers. One before each validation, whose time
                # and memory are not those of training.
                if validating or saving or self._due(1, training.log_every):
                    self._log()
                if validating:
                    self._validate()
                    self.telemetry.restart()
                if saving:
                    self._save()
                if stopping and not last:
                    self.telemetry.say(f"Stopped at step {self.step}; resume with training.resume=true.")
                    return
        self.telemetry.say(f"Done: {self.steps} steps; {self._outcome()}.")

    def _due(self, epochs: int, steps: int) -> bool:
        """Whether so many epochs or so many steps have passed again; 0: neither counts."""
        by_epochs = epochs > 0 and self.epochs.ends(self.step, epochs)
        return by_epochs or (steps > 0 and self.step % steps == 0)

    def _log(self) -> None:
        means = self.telemetry.flush(self.step, self.epochs.passed(self.step), self._rates())
        if broken := no_number(means):
            clipping = "" if self.config.optimizer.clip_norm else ", and optimizer.clip_norm set"
            raise TrainingError(
                f"The {broken} is no longer a number at step {self.step}; the items of the last steps are named in "
                f"{self._name_items()}. Begin a new run with a lower optimizer.learning_rate{clipping}."
            )
        self.items_since_log.clear()

    def _rates(self) -> dict[str, float]:
        """The learning rate of the step just taken, and that of each tower that has one of its own."""
        optimizer = self.config.optimizer
        factor = rate_factor(self.step - 1, self.steps, optimizer)
        peaks = {
            "learning_rate": optimizer.learning_rate,
            "learning_rate_image_tower": optimizer.image_tower_rate,
            "learning_rate_text_tower": optimizer.text_tower_rate,
        }
        return {name: factor * peak for name, peak in peaks.items() if peak is not None}

    def _name_items(self) -> Path:
        """Write the names of this rank's items since the last row of the log; returns the file."""
        path = self.directory / f"last-items-rank{self.ranks.rank}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            first = self.step - len(self.items_since_log) + 1
            for step, numbers in enumerate(self.items_since_log, first):
                names = [name_of(self.sources, number) for number in numbers]
                file.write(json.dumps({"step": step, "items": names}) + "\n")
        return path

    def _accept_cached(self, bad: Sequence[tuple[str, str]], items: int) -> None:
        """Name the items that could not be read when all of them were decoded, by every rank alike: none of them is
        drawn."""
        self.telemetry.name_bad(bad, alike=True)
        self._refuse_too_many_bad(len(bad), items, bad)

    def _refuse_too_many_bad(self, bad: int, read: int, named: Sequence[tuple[str, str]]) -> None:
        """Stop if too many could not be read, of which the last ones are named."""
        if too_many(bad, read, self.config.data.max_bad_share):
            last = named[-1][0] if named else "named above"
            raise TrainingError(
                f"{bad} of {read} samples could not be read, more than data.max_bad_share allows; the last: {last}."
            )

    def _save(self) -> None:
        random, parts = random_state(self.device), self._state()  # meetings of all ranks, as is the sum
        samples = sum_over_ranks([self.samples_read, self.samples_bad])
        if not self.ranks.first:
            return
        state = {
            "format": FORMAT,
            "config": self.config.model_dump(mode="json"),
            "step": self.step,
            "best": self.best,
            "items": self.epochs.lengths,
            "samples": samples,
            "random": random,
            **parts,
        }
        save_checkpoint(self.directory, state, self.step, self.config.training.keep_checkpoints)

    def _restore(self, state: dict[str, Any]) -> None:
        self._restore_state(state)
        self.step = state["step"]
        validation = self.config.model_dump(mode="json")["data"]["validation"]
        if self._as_now(state["config"])["data"]["validation"] == validation:  # else figures do not compare
            self.best = state["best"]
        rank, ranks = self.ranks.rank, self.ranks.count
        self.samples_read, self.samples_bad = ((count + rank) // ranks for count in state["samples"])
        self._ranks_before = len(state["random"])
        restore_random_state(state["random"], self.ranks, self.config.training.seed, self.step)

    def _as_now(self, before: dict[str, Any]) -> dict[str, Any]:
        """The settings of a checkpoint; those that are newer than it have their default."""
        try:
            return type(self.config).model_validate(before).model_dump(mode="json")
        except ValidationError:  # of another kind of training, or with a setting that is no more: refused as it stands
            return before


def run_training(kind: type[TrainingRun[Config, Any]], config: Config) -> Path:
    """Train as configured; returns the run directory.

    Raises:
        ConfigError: settings that contradict each other or a run that is already there.
        SourceError: a source without samples.
        TrainingError: the loss is no number, too many samples cannot be read, the run cannot be written, or another
            process of it has gone.
    """
    training = config.training
    with (
        writing_to(Path(training.output)),
        deterministic_arithmetic(training.deterministic),
        process_group(training.device) as ranks,
    ):
        with ending_at_sigterm():
            run = kind(config, ranks)
        try:
            run.train()
        except BaseException as error:
            run.telemetry.close()
            if ranks.first:
                # torchrun ends what is left of a run in which a rank failed, and what this one says is yet to come;
                # no report can be written on a disk that is full, nor of a run that ended before its first row
                with StopRequest(ranks), suppress(OSError, TrainingError):
                    write_report([run.directory])
            if isinstance(error, RuntimeError) and ranks.count > 1 and lost_another_rank(error):
                raise TrainingError(
                    f"Process {ranks.rank} of the run lost touch with another one, which has ended or cannot be "
                    "reached; if it said why, that stands beside this. Resume with training.resume=true."
                ) from error
            raise
        run.telemetry.close()
        if ranks.first:
            write_report([run.directory])
        return run.directory
