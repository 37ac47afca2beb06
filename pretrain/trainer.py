"""The training loop.

    cots pretrain configs/cots_mini.yaml training.epochs=5                       # one process
    torchrun --nproc-per-node 2 -m pretrain configs/cots_mini.yaml               # one process a GPU

A run directory holds config.yaml, log.jsonl (see telemetry.py), checkpoints/ (the whole state) and best/ (the model
directory that did best on validation). A run goes on where it stopped with training.resume=true.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.parallel import DistributedDataParallel

from cots.config import PretrainConfig
from cots.data.transforms import ColorJitter, SquareTransform
from cots.errors import ConfigError, TrainingError
from cots.model.dual_encoder import DualEncoder
from cots.model.model_directory import save_model
from cots.model.text_tower import WordPieceTokenizer
from cots.objectives.collaborative import CollaborativeObjective
from cots.objectives.contrastive import PairFeatures
from cots.objectives.gathering import gather
from pretrain.checkpoint import latest_checkpoint, random_state, read_checkpoint, restore_random_state, save_checkpoint
from pretrain.distributed import Ranks, process_group
from pretrain.loader import Batch, open_source, steps_per_epoch, training_loader
from pretrain.model_card import model_card
from pretrain.momentum import MovingAverage
from pretrain.optimizer import create_optimizer, rate_factor, set_rates
from pretrain.start import starting_encoder, starting_tokenizer
from pretrain.telemetry import Telemetry
from pretrain.validation import Validation, criterion

# the order of the samples and the saved averages hang on these
_KEPT_ON_RESUMING = ("batch_size", "seed", "averaging")


def pretrain(config: PretrainConfig) -> Path:
    """Train a model as configured; returns the run directory.

    Raises:
        ConfigError: settings that contradict each other or a run that is already there.
        SourceError: a source without pairs.
        TrainingError: the loss is no number, or too many samples cannot be read.
    """
    with process_group(config.training.device) as ranks:
        run = Run(config, ranks)
        try:
            run.train()
        finally:
            run.telemetry.close()
        return run.directory


class Run:
    """The parts of one training and the loop over its steps."""

    def __init__(self, config: PretrainConfig, ranks: Ranks) -> None:
        training = config.training
        if training.batch_size % ranks.count:
            raise ConfigError(f"training.batch_size {training.batch_size} does not divide among {ranks.count} ranks.")
        self.config, self.ranks, self.device = config, ranks, ranks.device
        self.directory = Path(training.output)
        checkpoint = _checkpoint_to_resume(self.directory, training.resume)

        torch.manual_seed(training.seed)  # the same weights on every rank
        self.tokenizer: WordPieceTokenizer = starting_tokenizer(config)
        self.encoder: DualEncoder = starting_encoder(config, self.tokenizer)
        self.encoder.to(self.device).to(memory_format=torch.channels_last)
        self.objective = CollaborativeObjective(config.objective, config.model.embedding_dim).to(self.device)
        self.momentum = MovingAverage(self.encoder, config.objective.momentum)
        self.average = MovingAverage(self.encoder, training.averaging) if training.averaging else None
        self.optimizer = create_optimizer(self.encoder, self.objective, config.optimizer)
        self.parallel: torch.nn.Module = self.encoder
        if ranks.count > 1:
            self.parallel = DistributedDataParallel(self.encoder)
        if training.compile:
            for encoder in (self.encoder, self.momentum.network):
                encoder.image_tower.compile()
                encoder.text_tower.compile()
        self.dtype = torch.bfloat16 if _uses_bf16(training.precision, self.device) else None
        self.jitter = ColorJitter(config.data.augmentation.color)

        self.sources = [open_source(source) for source in config.data.train]
        weights = [source.weight for source in config.data.train]
        self.epoch_steps = steps_per_epoch([len(source) for source in self.sources], weights, training.batch_size)
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
        self.telemetry = Telemetry(self.directory, self.steps, self.step, training.batch_size, ranks.first)

    def train(self) -> None:
        """Take every step that is left."""
        config, training = self.config, self.config.training
        self.telemetry.say(self._introduction())
        if training.resume and self.step == 0:
            self.telemetry.say(f"{self.directory} holds no checkpoint to go on from; this run starts from nothing.")
        loader = training_loader(
            self.sources,
            config.data,
            self.tokenizer,
            config.data.image_size or config.model.image_tower.image_size,
            batch_size=training.batch_size,
            steps=self.steps,
            first_step=self.step,
            seed=training.seed,
            rank=self.ranks.rank,
            ranks=self.ranks.count,
            pin_memory=self.device.type == "cuda",
        )
        batches = iter(loader)
        self.parallel.train()
        while self.step < self.steps:
            asked = time.perf_counter()
            batch = next(batches).to(self.device)
            waited = time.perf_counter() - asked
            self._count_bad(batch)
            scalars = self._take_step(batch)
            self.telemetry.step(scalars, waited)
            self.step += 1
            last = self.step == self.steps
            if self.step % training.log_every == 0 or last or self.step % self.epoch_steps == 0:
                self._log()
            if self._due(training.validate_every) or last:
                self._validate()
            if self._due(training.checkpoint_every) or last:
                self._save()
        self.telemetry.say(f"Done: {self.steps} steps; the best model is in {self.directory / 'best'}.")

    def _take_step(self, batch: Batch) -> dict[str, torch.Tensor]:
        config = self.config
        set_rates(self.optimizer, rate_factor(self.step, self.steps, config.optimizer))
        pixels = self.jitter(batch.pixels).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            image, text = self.parallel(pixels, batch.token_ids)
            image_momentum, text_momentum = image, text
            if self.objective.uses_momentum:
                with torch.no_grad():
                    image_momentum, text_momentum = self.momentum.network(pixels, batch.token_ids)
        # an item with several captions becomes as many pairs, its picture encoded once
        captions = config.data.captions_per_item
        item_ids = batch.item_ids.repeat_interleave(captions)
        features = PairFeatures(
            image=image.embedding.repeat_interleave(captions, dim=0),
            text=text.embedding,
            item_ids=item_ids,
            image_momentum=gather(image_momentum.embedding.repeat_interleave(captions, dim=0)),
            text_momentum=gather(text_momentum.embedding),
            all_item_ids=gather(item_ids),
        )
        output = self.objective(features)
        output.loss.backward()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.objective.uses_momentum:
            self.momentum.update()
        self._update_average()
        self.objective.enqueue(features)
        return {**output.scalars, "gradient_norm": norm.detach()}

    def _update_average(self) -> None:
        if self.average is None:
            return
        if self.step < self.config.training.averaging_start * self.steps:
            self.average.reset()
        else:
            self.average.update()

    def _log(self) -> None:
        factor = rate_factor(self.step - 1, self.steps, self.config.optimizer)
        means = self.telemetry.flush(self.step, self.step / self.epoch_steps, {"rate_factor": factor})
        if not math.isfinite(means["loss"]):
            raise TrainingError(
                f"The loss is no longer a number at step {self.step}; lower the learning rate or set "
                "optimizer.clip_norm."
            )

    def _validate(self) -> None:
        if self.validation is None or not self.config.data.validation:
            return
        network = self.encoder if self.average is None else self.average.network
        network.eval()
        results = self.validation.measure(network, self.device)
        self.encoder.train()
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
            card = model_card(self.config, results)
            save_model(
                self.directory / "best",
                network,
                self.tokenizer,
                weights_dtype=self.config.training.weights_dtype,
                card=card,
            )
        self.telemetry.restart()

    def _save(self) -> None:
        random = random_state()
        if not self.ranks.first:
            return
        state = {
            "config": self.config.model_dump(mode="json"),
            "step": self.step,
            "best": self.best,
            "samples": [self.samples_read, self.samples_bad],
            "encoder": self.encoder.state_dict(),
            "momentum": self.momentum.network.state_dict(),
            "average": self.average.network.state_dict() if self.average else None,
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": random,
        }
        save_checkpoint(self.directory, state, self.step, self.config.training.keep_checkpoints)

    def _restore(self, path: Path) -> None:
        state = read_checkpoint(path)
        before, now = state["config"], self.config.model_dump(mode="json")
        for section in ("model", "data", "objective", "optimizer"):
            if before[section] != now[section]:
                raise ConfigError(f"{path} was trained with another {section!r} section; start a new training.output.")
        for name in _KEPT_ON_RESUMING:
            if before["training"][name] != now["training"][name]:
                raise ConfigError(
                    f"{path} was trained with training.{name}={before['training'][name]}, not {now['training'][name]}; "
                    "give the same value or start a new training.output."
                )
        self.encoder.load_state_dict(state["encoder"])
        self.momentum.network.load_state_dict(state["momentum"])
        if self.average is not None:
            self.average.network.load_state_dict(state["average"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best = state["step"], state["best"]
        self.samples_read, self.samples_bad = state["samples"]
        restore_random_state(state["random"], self.ranks.rank)

    def _due(self, epochs: int) -> bool:
        return epochs > 0 and self.step % (epochs * self.epoch_steps) == 0

    def _count_bad(self, batch: Batch) -> None:
        self.samples_read += len(batch.item_ids)
        self.samples_bad += len(batch.bad)
        for name, reason in batch.bad:
            self.telemetry.say(f"skipped {name}: {reason}")
        allowed = self.config.data.max_bad_share * max(self.samples_read, 1000)
        if self.samples_bad > allowed:
            raise TrainingError(
                f"{self.samples_bad} of {self.samples_read} samples could not be read, more than data.max_bad_share "
                f"allows; the last: {batch.bad[-1][0] if batch.bad else 'named above'}."
            )

    def _introduction(self) -> str:
        weights = sum(parameter.numel() for parameter in self.encoder.parameters())
        pairs = sum(len(source) for source in self.sources)
        return (
            f"{weights / 1e6:.1f} M parameters, {pairs} items, "
            f"{self.steps} steps of {self.config.training.batch_size} pairs ({self.epoch_steps} an epoch), "
            f"{self.ranks.count} x {self.device.type}, {'bf16' if self.dtype else 'fp32'}; "
            f"from step {self.step}; into {self.directory}"
        )


def _uses_bf16(precision: str, device: torch.device) -> bool:
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


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
