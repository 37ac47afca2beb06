"""The training loop.

    cots pretrain configs/cots_mini.yaml training.epochs=5                       # one process
    torchrun --nproc-per-node 2 -m pretrain configs/cots_mini.yaml               # one process a GPU

A run directory holds config.yaml, log.jsonl (see telemetry.py), report.html (its curves), checkpoints/ (the whole
state) and best/ (the model directory that did best on validation). A run goes on where it stopped with
training.resume=true.
"""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from cots.config import PretrainConfig
from cots.data.square_transform import SquareTransform
from cots.errors import ConfigError, TrainingError
from cots.model.dual_encoder import DualEncoder
from cots.model.model_directory import save_model
from cots.model.open_clip_architecture import OPEN_CLIP
from cots.model.visual_tokenizer import VisualTokenizer, load_visual_tokenizer
from cots.objectives.collaborative import CollaborativeObjective
from pretrain.checkpoint import (
    latest_checkpoint,
    random_state,
    read_checkpoint,
    refuse_other_items,
    refuse_other_training,
    restore_random_state,
    save_checkpoint,
    writing_to,
)
from pretrain.distributed import Ranks, StopRequest, process_group
from pretrain.flops import matrix_rate
from pretrain.loader import Batch, StepSampler, training_loader
from pretrain.loader_workers import start_server
from pretrain.model_card import model_card
from pretrain.network import TrainingNetwork, freeze_unused, token_grid
from pretrain.optimizer import rate_factor
from pretrain.pair_sources import name_of, open_source
from pretrain.pixel_cache import PixelCache, cached_batches
from pretrain.report import write_report
from pretrain.start import starting_encoder, starting_tokenizer
from pretrain.step import TrainingStep, uses_bf16
from pretrain.step_cost import StepCost
from pretrain.stored_tokens import TokenizedPairs, tokenized_loader
from pretrain.telemetry import Telemetry, no_number
from pretrain.unusable import name_left_out, too_many
from pretrain.validation import Metrics, Validation, criterion


def pretrain(config: PretrainConfig) -> Path:
    """Train a model as configured; returns the run directory.

    Raises:
        ConfigError: settings that contradict each other or a run that is already there.
        SourceError: a source without pairs.
        TrainingError: the loss is no number, too many samples cannot be read, or the run cannot be written.
    """
    with writing_to(Path(config.training.output)), process_group(config.training.device) as ranks:
        run = Run(config, ranks)
        try:
            run.train()
        finally:
            run.telemetry.close()
        if ranks.first:
            write_report([run.directory])
        return run.directory


class Run:
    """The parts of one training and the loop over its steps."""

    def __init__(self, config: PretrainConfig, ranks: Ranks) -> None:
        training = config.training
        if training.batch_size % (ranks.count * training.accumulation):
            raise ConfigError(
                f"training.batch_size {training.batch_size} does not divide among {ranks.count} ranks"
                + (f" in {training.accumulation} parts." if training.accumulation > 1 else ".")
            )
        self.config, self.ranks, self.device = config, ranks, ranks.device
        self.directory = Path(training.output)
        checkpoint = _checkpoint_to_resume(self.directory, training.resume)

        if self.device.type == "cuda" and config.data.workers and config.data.cache_side is None:
            # it imports what the loader's workers run while the networks are built
            start_server(["open_clip"] if config.model.text_tower.name.startswith(OPEN_CLIP) else [])
        self.stepper = create_step(config, ranks)
        self.tokenizer = self.stepper.tokenizer

        if not config.data.train:
            raise ConfigError("data.train names no source; give one, such as data.train='[{path: pairs.tar}]'.")
        self.sources = [open_source(source) for source in config.data.train]
        self.sampler = StepSampler(
            [len(source) for source in self.sources],
            [source.weight for source in config.data.train],
            training.batch_size,
            training.seed,
            ranks.rank,
            ranks.count,
        )
        masked = config.objective.masked_modeling
        self.tokenized = self._tokenized_pairs() if masked.image_weight and masked.stored_tokens else None
        self.epoch_steps = self.sampler.steps_per_epoch
        self.steps = max(1, round(training.epochs * self.epoch_steps))
        self.step = 0
        self.samples_read = self.samples_bad = 0
        self.best: dict[str, Any] = {"criterion": -1.0, "step": -1}
        torch.manual_seed(training.seed + 1 + ranks.rank)  # other dropout on every rank
        if checkpoint is not None:
            self._restore(checkpoint)
        if ranks.first:
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        image = config.model.image_tower
        self.validation = (
            Validation(
                config.data.validation,
                self.tokenizer,
                SquareTransform(image.image_size, image.resize),
                config.data.workers,
            )
            if ranks.first
            else None
        )
        self.telemetry = Telemetry(
            self.directory,
            self.steps,
            self.step,
            training.batch_size,
            ranks.first,
            ranks=ranks.count,
            settings=config.model_dump(mode="json"),
            tensorboard=training.tensorboard,
            wandb=training.wandb,
        )
        self.items_since_log: list[list[int]] = []

    def _tokenized_pairs(self) -> TokenizedPairs:
        data, seed = self.config.data, self.config.training.seed
        size = data.image_size or self.config.model.image_tower.image_size
        named_by = load_visual_tokenizer(self.config.objective.masked_modeling.visual_tokenizer).fingerprint()
        return TokenizedPairs(self.sources, self.tokenizer, data, size, self.stepper.grid, named_by, seed)

    def train(self) -> None:
        """Take every step that is left, or those until SIGTERM."""
        training = self.config.training
        self.telemetry.say(self._introduction())
        name_left_out(self.sources, self.config.data.max_bad_share, self.telemetry.say)
        if training.resume and self.step == 0:
            self.telemetry.say(f"{self.directory} holds no checkpoint to go on from; this run starts from nothing.")
        rate = matrix_rate(self.device)
        cost: StepCost | None = None
        if rate is not None:
            cost = StepCost(self.stepper, training.batch_size // self.ranks.count)
            self.telemetry.utilisation(cost.per_item, rate)
        with StopRequest(self.ranks) as stop:
            batches = self._batches()
            self.stepper.parallel.train()
            self.telemetry.restart()
            while self.step < self.steps:
                asked = time.perf_counter()
                batch = next(batches).to(self.device)
                waited = time.perf_counter() - asked
                self._count_bad(batch)
                self.items_since_log.append(batch.numbers)
                scalars = self.stepper.take(batch, self.step, self.steps)
                self.telemetry.step(scalars, waited, cost.flops(batch) if cost else 0.0)
                self.step += 1
                last = self.step == self.steps
                stopping = stop.requested()
                steps = training.checkpoint_steps
                saving = self._due(training.checkpoint_every) or last or stopping or (steps and self.step % steps == 0)
                # a row before each checkpoint: a run that goes on from it begins the next row as one that was not
                # stopped does, and no weights are saved that are no numbers
                if saving or self.step % training.log_every == 0 or self.step % self.epoch_steps == 0:
                    self._log()
                if self._due(training.validate_every) or last:
                    self._validate()
                if saving:
                    self._save()
                if stopping and not last:
                    self.telemetry.say(f"Stopped at step {self.step}; go on with training.resume=true.")
                    return
        which = "best model" if self.config.data.validation else "last model, for data.validation names no source,"
        self.telemetry.say(f"Done: {self.steps} steps; the {which} is in {self.directory / 'best'}.")

    def _batches(self) -> Iterator[Batch]:
        data = self.config.data
        size = data.image_size or self.config.model.image_tower.image_size
        sampler = self.sampler.between(self.step, self.steps)
        pinned = self.device.type == "cuda"
        if self.tokenized is not None:
            return iter(tokenized_loader(self.tokenized, data.workers, sampler, pin_memory=pinned))
        if data.cache_side is None:
            return iter(training_loader(self.sources, data, self.tokenizer, size, sampler, pin_memory=pinned))
        started = time.perf_counter()
        cache = PixelCache(self.sources, self.tokenizer, data, self.device)
        seconds, size_mib = time.perf_counter() - started, cache.pixels.nbytes / 2**20
        self.telemetry.say(f"{len(cache)} items decoded in {seconds:.0f} s into {size_mib:.0f} MiB")
        self._refuse_too_many_bad(cache.bad, len(cache), alike=True)
        return cached_batches(cache, data, sampler, size, self.config.training.seed)

    def _log(self) -> None:
        factor = rate_factor(self.step - 1, self.steps, self.config.optimizer)
        means = self.telemetry.flush(
            self.step, self.step / self.epoch_steps, {"learning_rate": factor * self.config.optimizer.learning_rate}
        )
        if broken := no_number(means):
            raise TrainingError(
                f"The {broken} is no longer a number at step {self.step}; the items of the last steps are named in "
                f"{self._name_items()}. Lower the learning rate or set optimizer.clip_norm."
            )
        self.items_since_log.clear()

    def _name_items(self) -> Path:
        """Write the names of the items since the last row of the log; returns the file."""
        path = self.directory / f"last-items-rank{self.ranks.rank}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            first = self.step - len(self.items_since_log) + 1
            for step, numbers in enumerate(self.items_since_log, first):
                names = [name_of(self.sources, number) for number in numbers]
                file.write(json.dumps({"step": step, "items": names}) + "\n")
        return path

    def _validate(self) -> None:
        validated = bool(self.config.data.validation)
        if not validated and self.step < self.steps:
            return
        with self.stepper.shipped_encoder() as encoder:
            if encoder is not None and validated:
                self._measure(encoder)
            elif encoder is not None:
                self._keep(encoder, {})  # nothing chose it, but it is what the training came to
        self.telemetry.restart()

    def _measure(self, network: DualEncoder) -> None:
        """Validate on the first rank, and keep the model if it is the best so far."""
        assert self.validation is not None
        results = self.validation.measure(network, self.device)
        score, epoch = criterion(results), self.step / self.epoch_steps
        self.telemetry.validation(self.step, epoch, results)
        for path, metrics in results.items():
            both = "   ".join(
                f"{way.replace('_', ' ')} R@1/5/10 {m['R@1']:.1f} / {m['R@5']:.1f} / {m['R@10']:.1f}"
                for way, m in metrics.items()
            )
            self.telemetry.say(f"epoch {epoch:.1f}  {Path(path).name}  {both}")
        if score > self.best["criterion"]:
            self.best = {"criterion": score, "step": self.step, "results": results}
            self._keep(network, results)

    def _keep(self, network: DualEncoder, results: dict[str, Metrics]) -> None:
        dtype, card = self.config.training.weights_dtype, model_card(self.config, results)
        save_model(self.directory / "best", network, self.tokenizer, weights_dtype=dtype, card=card)

    def _save(self) -> None:
        random, parts = random_state(), self.stepper.state()  # both meetings of all ranks
        if not self.ranks.first:
            return
        state = {
            "config": self.config.model_dump(mode="json"),
            "step": self.step,
            "best": self.best,
            "items": self.sampler.lengths,
            "samples": [self.samples_read, self.samples_bad],
            "random": random,
            **parts,
        }
        save_checkpoint(self.directory, state, self.step, self.config.training.keep_checkpoints)

    def _restore(self, path: Path) -> None:
        state = read_checkpoint(path)
        before = state["config"]
        with suppress(ValidationError):  # of another kind of training, which is refused
            before = PretrainConfig.model_validate(before).model_dump(mode="json")  # what is newer has its default
        now = self.config.model_dump(mode="json")
        refuse_other_training(path, before, now)
        refuse_other_items(path, state.get("items"), self.sampler.lengths)
        self.stepper.restore(state)
        self.step = state["step"]
        if before["data"]["validation"] == now["data"]["validation"]:  # recalls on other pairs do not compare
            self.best = state["best"]
        if self.config.data.cache_side is None:  # else all are read anew, and counted
            self.samples_read, self.samples_bad = state["samples"]
        restore_random_state(state["random"], self.ranks.rank, self.ranks.count)

    def _due(self, epochs: int) -> bool:
        return epochs > 0 and self.step % (epochs * self.epoch_steps) == 0

    def _count_bad(self, batch: Batch) -> None:
        self.samples_read += len(batch.item_ids)
        self._refuse_too_many_bad(batch.bad, self.samples_read, alike=False)

    def _refuse_too_many_bad(self, bad: list[tuple[str, str]], read: int, *, alike: bool) -> None:
        self.samples_bad += len(bad)
        self.telemetry.name_bad(bad, alike=alike)
        if too_many(self.samples_bad, read, self.config.data.max_bad_share):
            raise TrainingError(
                f"{self.samples_bad} of {read} samples could not be read, more than data.max_bad_share "
                f"allows; the last: {bad[-1][0] if bad else 'named above'}."
            )

    def _introduction(self) -> str:
        weights = sum(parameter.numel() for parameter in self.stepper.network.encoder.parameters())
        pairs = sum(len(source) for source in self.sources)
        return (
            f"{weights / 1e6:.1f} M parameters, {pairs} items, "
            f"{self.steps} steps of {self.config.training.batch_size} pairs ({self.epoch_steps} an epoch), "
            f"{self.ranks.count} x {self.device.type}, {'bf16' if self.stepper.low_precision else 'fp32'}; "
            f"from step {self.step}; into {self.directory}"
        )


def create_step(config: PretrainConfig, ranks: Ranks) -> TrainingStep:
    """The networks and their state as they stand before the first step: the same weights on every rank.

    Raises:
        ConfigError: settings that contradict each other.
        ModelError: weights to start from, or the visual tokenizer, are missing or of another architecture.
    """
    torch.manual_seed(config.training.seed)
    tokenizer = starting_tokenizer(config)
    encoder = starting_encoder(config, tokenizer)
    grid = token_grid(encoder, config)
    freeze_unused(encoder, config)
    masked = config.objective.masked_modeling
    visual_tokenizer: VisualTokenizer | None = None
    if masked.image_weight:
        precision = torch.bfloat16 if uses_bf16(config.training.precision, ranks.device) else torch.float32
        visual_tokenizer = load_visual_tokenizer(masked.visual_tokenizer).to(ranks.device, precision)
    network = TrainingNetwork(encoder, masked, visual_tokenizer.codebook_size if visual_tokenizer else 0)
    network.to(ranks.device).to(memory_format=torch.channels_last)
    objective = CollaborativeObjective(config.objective, config.model.embedding_dim).to(ranks.device)
    return TrainingStep(network, objective, config, ranks, tokenizer, visual_tokenizer, grid)


def _checkpoint_to_resume(directory: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, if there is one.

    Raises:
        ConfigError: there is one, but it is not to be resumed.
    """
    checkpoint = latest_checkpoint(directory)
    if checkpoint is not None and not resume:
        raise ConfigError(
            f"{directory} holds a run already; go on with training.resume=true or choose another training.output."
        )
    return checkpoint
