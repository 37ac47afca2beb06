"""The training of a visual tokenizer.

    cots pretrain configs/visual_tokenizer.yaml                                        # one process
    torchrun --nproc-per-node 2 -m pretrain configs/visual_tokenizer.yaml              # one process a GPU

A run directory holds config.yaml, log.jsonl (see telemetry.py), checkpoints/ (the whole state), reconstructions/ (at
every validation a sheet of pictures above what their tokens keep of them) and best/ (the tokenizer with the lowest
reconstruction error on validation). A run goes on where it stopped with training.resume=true.
"""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cots.config import OptimizerConfig
from cots.data.device_augmentation import DeviceAugmentation
from cots.data.transforms import ColorJitter
from cots.errors import ConfigError, TrainingError
from cots.model.visual_tokenizer import VisualTokenizer, save_visual_tokenizer
from cots.tokenizer_config import VisualTokenizerTrainingConfig
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
from pretrain.loader import StepSampler
from pretrain.loader_workers import start_server
from pretrain.momentum import MovingAverage
from pretrain.optimizer import rate_factor, set_rates
from pretrain.pair_sources import name_of, open_source
from pretrain.report import write_report
from pretrain.telemetry import Telemetry, no_number
from pretrain.tokenizer_objective import TokenizerObjective, draw_far_patches, kl_weight, temperature_at
from pretrain.tokenizer_pictures import Bad, SquareFrames, Squares, decode_all, squares_from_loader, squares_in_memory
from pretrain.tokenizer_validation import TokenizerValidation
from pretrain.unusable import name_left_out, too_many

# what neither the weights nor the order of the samples hang on
_FREE_ON_RESUMING = {
    "data": {"workers", "validation", "max_bad_share"},
    "training": {
        "output", "resume", "device", "compile", "log_every", "validate_every", "checkpoint_every", "checkpoint_steps",
        "keep_checkpoints", "weights_dtype", "tensorboard", "wandb",
    },
}  # fmt: skip


def train_visual_tokenizer(config: VisualTokenizerTrainingConfig) -> Path:
    """Train a visual tokenizer as configured; returns the run directory.

    Raises:
        ConfigError: settings that contradict each other or a run that is already there.
        SourceError: a source without pictures.
        TrainingError: the loss is no number, too many samples cannot be read, or the run cannot be written.
    """
    with writing_to(Path(config.training.output)), process_group(config.training.device) as ranks:
        run = TokenizerRun(config, ranks)
        try:
            run.train()
        finally:
            run.telemetry.close()
        if ranks.first:
            write_report([run.directory])
        return run.directory


class TokenizerRun:
    """The parts of one training and the loop over its steps."""

    def __init__(self, config: VisualTokenizerTrainingConfig, ranks: Ranks) -> None:
        training = config.training
        if training.batch_size % ranks.count:
            raise ConfigError(f"training.batch_size {training.batch_size} does not divide among {ranks.count} ranks.")
        self.config, self.ranks, self.device = config, ranks, ranks.device
        self.directory = Path(training.output)
        self.side = config.data.image_size or config.visual_tokenizer.image_size
        if self.side % config.visual_tokenizer.stride:
            raise ConfigError(
                f"data.image_size {self.side} is not a multiple of the stride {config.visual_tokenizer.stride}."
            )
        checkpoint = latest_checkpoint(self.directory)
        if checkpoint is not None and not training.resume:
            raise ConfigError(
                f"{self.directory} holds a run already; go on with training.resume=true or choose another "
                "training.output."
            )
        if self.device.type == "cuda" and config.data.workers:
            start_server()  # it imports what the loader's workers run while the network is built
        self._open_data()
        torch.manual_seed(training.seed)  # the same weights on every rank
        self.tokenizer = VisualTokenizer(config.visual_tokenizer).to(self.device).to(memory_format=torch.channels_last)
        self.average = MovingAverage(self.tokenizer, training.averaging) if training.averaging else None
        self.objective = TokenizerObjective(config.objective, config.visual_tokenizer.codebook_size).to(self.device)
        self.optimizer = _create_optimizer(self.tokenizer, config.optimizer)
        self.parallel: torch.nn.Module = self.tokenizer
        if ranks.count > 1:
            self.parallel = DistributedDataParallel(self.tokenizer)
        if training.compile:
            self.tokenizer.encoder.compile()
            self.tokenizer.decoder.compile()
        bf16 = training.precision == "bf16" or (training.precision == "auto" and self.device.type == "cuda")
        self.dtype = torch.bfloat16 if bf16 else None
        self.augment = DeviceAugmentation(self.side, config.data.augmentation)
        self.jitter = ColorJitter(config.data.augmentation.color)
        self.step = 0
        self.best: dict[str, Any] = {"criterion": math.inf, "step": -1}
        torch.manual_seed(training.seed + 1 + ranks.rank)  # other draws of codes on every rank
        if checkpoint is not None:
            self._restore(checkpoint)
        self.logged = self.step
        if ranks.first:
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
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

    def _open_data(self) -> None:
        data, training = self.config.data, self.config.training
        side = data.cache_side or self.side
        if side < self.side:
            raise ConfigError(f"data.cache_side {side} is less than the {self.side} px of the crops; raise it.")
        if not data.train:
            raise ConfigError("data.train names no source; add a path to train on.")
        sources = [open_source(source) for source in data.train]
        self.frames = SquareFrames(sources, side)
        self.sampler = StepSampler(
            [len(source) for source in sources],
            [source.weight for source in data.train],
            training.batch_size,
            training.seed,
            self.ranks.rank,
            self.ranks.count,
        )
        self.epoch_steps = self.sampler.steps_per_epoch
        self.steps = max(1, round(training.epochs * self.epoch_steps))
        self.samples_read = self.samples_bad = 0
        shape = self.config.visual_tokenizer
        self.validation = (
            TokenizerValidation(data.validation, shape.image_size, data.workers) if self.ranks.first else None
        )

    def train(self) -> None:
        """Take every step that is left, or those until SIGTERM."""
        training = self.config.training
        self.telemetry.say(self._introduction())
        name_left_out(self.frames.sources, self.config.data.max_bad_share, self.telemetry.say)
        if training.resume and self.step == 0:
            self.telemetry.say(f"{self.directory} holds no checkpoint to go on from; this run starts from nothing.")
        with StopRequest(self.ranks) as stop:
            steps = self._squares()
            self.parallel.train()
            self.telemetry.restart()
            while self.step < self.steps:
                asked = time.perf_counter()
                squares = next(steps)
                waited = time.perf_counter() - asked
                self.samples_read += len(squares.pixels)
                self._refuse_too_many_bad(squares.bad, self.samples_read, alike=False)
                self.telemetry.step(self.take_step(squares), waited)
                self.step += 1
                last, stopping = self.step == self.steps, stop.requested()
                every = training.checkpoint_steps
                saving = self._due(training.checkpoint_every) or last or stopping or (every and self.step % every == 0)
                if saving or self.step % training.log_every == 0 or self.step % self.epoch_steps == 0:
                    self._log()
                if self._due(training.validate_every) or last:
                    self._validate()
                if saving:
                    self._save()
                if stopping and not last:
                    self.telemetry.say(f"Stopped at step {self.step}; go on with training.resume=true.")
                    return
        kept = f"the best tokenizer is in {self.directory / 'best'}"
        kept = kept if self.config.data.validation else "data.validation names no source, so no tokenizer was saved"
        self.telemetry.say(f"Done: {self.steps} steps; {kept}.")

    def _squares(self) -> Iterator[Squares]:
        data, seed = self.config.data, self.config.training.seed
        sampler = self.sampler.between(self.step, self.steps)
        if data.cache_side is None:
            return squares_from_loader(self.frames, sampler, seed, data.workers, self.device)
        started = time.perf_counter()
        decoded = decode_all(self.frames.sources, data.cache_side, data.workers)
        seconds, size_mib = time.perf_counter() - started, decoded.frames.nbytes / 2**20
        self.telemetry.say(f"{len(self.frames)} items decoded in {seconds:.0f} s into {size_mib:.0f} MiB")
        if decoded.left_out:
            count = len(decoded.left_out)
            self.telemetry.say(f"{count} {'clip is' if count == 1 else 'clips are'} left out: {decoded.left_out[0][1]}")
        self._refuse_too_many_bad(decoded.bad, len(self.frames), alike=True)
        return squares_in_memory(decoded, sampler, seed, self.device)

    def take_step(self, squares: Squares) -> dict[str, Tensor]:
        """Train on a rank's part of a step; returns what the log has of it, on the device."""
        config, objective = self.config, self.config.objective
        progress = self.step / self.steps
        set_rates(self.optimizer, rate_factor(self.step, self.steps, config.optimizer))
        may_flip = torch.ones(len(squares.pixels), dtype=torch.bool, device=self.device)
        pixels = self.jitter(self.augment(squares.pixels, squares.draws, may_flip))
        if self.step == 0:
            self._place_codes(pixels)
        temperature = temperature_at(progress, objective)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            picture = self.parallel(pixels, temperature, straight_through=objective.relaxation == "straight_through")
        output = self.objective(picture, pixels, progress)
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            self.tokenizer.parameters(), config.optimizer.clip_norm or float("inf"), foreach=True
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        revived = 0
        if objective.revival and (self.step + 1) % objective.revival_every == 0 and progress < objective.revival_end:
            revived = self.objective.revive(self.tokenizer.codes, picture.features.detach(), self.optimizer)
        self._update_average()
        schedule = {"temperature": temperature, "kl_weight": kl_weight(progress, objective), "revived": float(revived)}
        # filled on the device: a copy from the CPU would wait for it
        constants = {name: torch.full((), value, device=self.device) for name, value in schedule.items()}
        return {**output.scalars, **constants, "gradient_norm": norm.detach()}

    @torch.no_grad()
    def _place_codes(self, pixels: Tensor) -> None:
        """Put the codes where the untrained encoder puts the first pictures: it uses but a small part of the sphere."""
        codes = self.tokenizer.codes
        codes.copy_(draw_far_patches(self.tokenizer.encode(pixels), codes, len(codes)))
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(codes.data, src=0)

    def _update_average(self) -> None:
        if self.average is None:
            return
        if self.step < self.config.training.averaging_start * self.steps:
            self.average.reset()
        else:
            self.average.update()

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
        self.logged = self.step

    def _name_items(self) -> Path:
        """Write the names of this rank's items since the last row of the log; returns the file."""
        path = self.directory / f"last-items-rank{self.ranks.rank}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for step, items in enumerate(self.sampler.between(self.logged, self.step), self.logged + 1):
                names = [name_of(self.frames.sources, item) for _, item in items]
                file.write(json.dumps({"step": step, "items": names}) + "\n")
        return path

    def _validate(self) -> None:
        if not self.validation:
            return
        tokenizer = self.tokenizer if self.average is None else self.average.network
        results = self.validation.measure(tokenizer, self.device)
        epoch = self.step / self.epoch_steps
        self.telemetry.validation(self.step, epoch, {path: {"reconstruction": m} for path, m in results.items()})
        for path, m in results.items():
            self.telemetry.say(
                f"epoch {epoch:.1f}  {Path(path).name}  PSNR {m['psnr']:.2f} dB (error {m['reconstruction_error']:.5f})"
                f"   {100 * m['codebook_usage']:.1f} % of the codes used, perplexity {m['codebook_perplexity']:.0f}"
            )
        sheets = self.directory / "reconstructions"
        sheets.mkdir(exist_ok=True)
        self.validation.sheet(tokenizer, self.device).save(sheets / f"step-{self.step:08d}.png")
        error = sum(m["reconstruction_error"] for m in results.values()) / len(results)
        if error < self.best["criterion"]:
            self.best = {"criterion": error, "step": self.step, "results": results}
            directory = self.directory / "best"
            card = tokenizer_card(self.config, results)
            save_visual_tokenizer(directory, tokenizer, weights_dtype=self.config.training.weights_dtype, card=card)
        self.telemetry.restart()

    def _save(self) -> None:
        random = random_state()
        if not self.ranks.first:
            return
        state = {
            "config": self.config.model_dump(mode="json"),
            "step": self.step,
            "best": self.best,
            "items": self.sampler.lengths,
            "samples": [self.samples_read, self.samples_bad],
            "tokenizer": self.tokenizer.state_dict(),
            "average": self.average.network.state_dict() if self.average else None,
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": random,
        }
        save_checkpoint(self.directory, state, self.step, self.config.training.keep_checkpoints)

    def _restore(self, path: Path) -> None:
        state = read_checkpoint(path)
        before, now = state["config"], self.config.model_dump(mode="json")
        if "tokenizer" not in state:
            raise ConfigError(f"{path} is of another kind of training; start a new training.output.")
        refuse_other_training(path, before, now, _FREE_ON_RESUMING)
        refuse_other_items(path, state.get("items"), self.sampler.lengths)
        self.tokenizer.load_state_dict(state["tokenizer"])
        if self.average is not None:
            self.average.network.load_state_dict(state["average"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        if before["data"]["validation"] == now["data"]["validation"]:  # errors on other pictures do not compare
            self.best = state["best"]
        if self.config.data.cache_side is None:
            self.samples_read, self.samples_bad = state["samples"]
        restore_random_state(state["random"], self.ranks.rank, self.ranks.count)

    def _due(self, epochs: int) -> bool:
        return epochs > 0 and self.step % (epochs * self.epoch_steps) == 0

    def _refuse_too_many_bad(self, bad: list[Bad], read: int, *, alike: bool) -> None:
        self.samples_bad += len(bad)
        self.telemetry.name_bad(bad, alike=alike)
        if too_many(self.samples_bad, read, self.config.data.max_bad_share):
            raise TrainingError(
                f"{self.samples_bad} of {read} samples could not be read, more than data.max_bad_share allows; the "
                f"last: {bad[-1][0] if bad else 'named above'}."
            )

    def _introduction(self) -> str:
        weights = sum(parameter.numel() for parameter in self.tokenizer.parameters())
        return (
            f"{weights / 1e6:.2f} M parameters, {self.config.visual_tokenizer.codebook_size} codes, "
            f"{len(self.frames)} items, {self.steps} steps of {self.config.training.batch_size} pictures of "
            f"{self.side} px ({self.epoch_steps} an epoch), {self.ranks.count} x {self.device.type}, "
            f"{'bf16' if self.dtype else 'fp32'}; from step {self.step}; into {self.directory}"
        )


def _create_optimizer(tokenizer: VisualTokenizer, config: OptimizerConfig) -> torch.optim.AdamW:
    """Convolutions are decayed; biases, the codes (whose length means nothing) and the sharpness are not."""
    decayed = [p for name, p in tokenizer.named_parameters() if p.ndim == 4]
    others = [p for name, p in tokenizer.named_parameters() if p.ndim != 4]
    groups = [
        {"params": parameters, "lr": config.learning_rate, "peak": config.learning_rate, "weight_decay": decay}
        for parameters, decay in ((decayed, config.weight_decay), (others, 0.0))
    ]
    return torch.optim.AdamW(groups, betas=config.betas, fused=others[0].is_cuda)


def tokenizer_card(config: VisualTokenizerTrainingConfig, results: dict[str, dict[str, float]]) -> str:
    """Markdown: what it is, what it was trained on, and its figures on validation."""
    shape = config.visual_tokenizer
    lines = [
        "# A COTS visual tokenizer",
        "",
        f"- A discrete VAE: {shape.codebook_size} codes of {shape.code_dim} dimensions, one for {shape.stride} x "
        f"{shape.stride} pixels",
        f"- Trained on: {', '.join(f'{source.path} (x{source.weight:g})' for source in config.data.train)}",
        f"- {config.training.epochs:g} epochs of pictures of {config.data.image_size or shape.image_size} px, batch "
        f"{config.training.batch_size}, seed {config.training.seed}",
        "",
        "| validation | mean squared error, pixels in [0, 1] | PSNR | codes used | perplexity |",
        "|---|---|---|---|---|",
    ]
    for path, m in results.items():
        lines.append(
            f"| {path} | {m['reconstruction_error']:.5f} | {m['psnr']:.2f} dB | {100 * m['codebook_usage']:.1f} % | "
            f"{m['codebook_perplexity']:.0f} |"
        )
    return "\n".join(lines) + "\n"
