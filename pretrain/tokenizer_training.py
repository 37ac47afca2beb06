"""The training of a visual tokenizer.

    cots pretrain configs/visual_tokenizer.yaml                                        # one process
    torchrun --nproc-per-node 2 -m pretrain configs/visual_tokenizer.yaml              # one process a GPU

A run directory holds config.yaml, log.jsonl (see telemetry.py), checkpoints/ (the whole state), reconstructions/ (at
every validation a sheet of pictures above what their tokens keep of them) and best/ (the tokenizer with the lowest
reconstruction error on validation). A run goes on where it stopped with training.resume=true.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cots.config import OptimizerConfig
from cots.data.device_augmentation import DeviceAugmentation
from cots.data.sample_draws import SampleDraws
from cots.data.transforms import ColorJitter
from cots.errors import ConfigError
from cots.model.visual_tokenizer import VisualTokenizer, save_visual_tokenizer
from cots.objectives.gathering import gather
from cots.tokenizer_config import VisualTokenizerTrainingConfig
from pretrain.determinism import compile_options
from pretrain.distributed import Ranks
from pretrain.loader_workers import start_server
from pretrain.momentum import MovingAverage
from pretrain.optimizer import rate_factor, set_rates
from pretrain.run_log import short_names
from pretrain.tokenizer_objective import TokenizerObjective, draw_far_patches, kl_weight, temperature_at
from pretrain.tokenizer_pictures import SquareFrames, Squares, decode_all, squares_from_loader, squares_in_memory
from pretrain.tokenizer_validation import TokenizerValidation
from pretrain.training_run import TrainingRun, run_training


def train_visual_tokenizer(config: VisualTokenizerTrainingConfig) -> Path:
    """Train a visual tokenizer as configured; returns the run directory.

    Raises:
        ConfigError: settings that contradict each other or a run that is already there.
        SourceError: a source without pictures.
        TrainingError: the loss is no number, too many samples cannot be read, or the run cannot be written.
    """
    return run_training(TokenizerRun, config)


class TokenizerRun(TrainingRun[VisualTokenizerTrainingConfig, Squares]):
    """The training of a visual tokenizer."""

    worst = math.inf

    def __init__(self, config: VisualTokenizerTrainingConfig, ranks: Ranks) -> None:
        super().__init__(config, ranks)
        training, shape = config.training, config.visual_tokenizer
        self.side = config.data.image_size or shape.image_size
        if self.side % shape.stride:
            raise ConfigError(f"data.image_size {self.side} is not a multiple of the stride {shape.stride}.")
        side = config.data.cache_side or self.side
        if side < self.side:
            raise ConfigError(f"data.cache_side {side} is less than the {self.side} px of the crops; raise it.")
        if self.device.type == "cuda" and config.data.workers:
            start_server()  # it imports what the loader's workers run while the network is built
        self._open_sources()
        self.frames = SquareFrames(self.sources, side)
        self.validation: TokenizerValidation | None = None
        if ranks.first:
            self.validation = TokenizerValidation(config.data.validation, shape.image_size, config.data.workers)
        torch.manual_seed(training.seed)  # the same weights on every rank
        self.tokenizer = VisualTokenizer(shape).to(self.device).to(memory_format=torch.channels_last)
        self.average = MovingAverage(self.tokenizer, training.averaging) if training.averaging else None
        self.objective = TokenizerObjective(config.objective, shape.codebook_size).to(self.device)
        self.optimizer = _create_optimizer(self.tokenizer, config.optimizer)
        self.parallel: nn.Module = self.tokenizer
        if ranks.count > 1:
            self.parallel = DistributedDataParallel(self.tokenizer)
        if training.compile:
            self.tokenizer.encoder.compile(options=compile_options())
            self.tokenizer.decoder.compile(options=compile_options())
        bf16 = training.precision == "bf16" or (training.precision == "auto" and self.device.type == "cuda")
        self.dtype = torch.bfloat16 if bf16 else None
        self.augment = DeviceAugmentation(self.side, config.data.augmentation)
        self.jitter = ColorJitter(config.data.augmentation.color, self.device)
        self.draws = SampleDraws(training.seed, self.device, ranks.rank, ranks.count)
        self._begin()

    @property
    def trained(self) -> nn.Module:
        return self.parallel

    def _samples(self) -> Iterator[Squares]:
        data, seed = self.config.data, self.config.training.seed
        sampler = self.sampler.between(self.step, self.steps)
        if data.cache_side is None:
            return squares_from_loader(self.frames, sampler, seed, data.workers, self.device)
        started = time.perf_counter()
        decoded = decode_all(self.sources, data.cache_side, data.workers)
        seconds, size_mib = time.perf_counter() - started, decoded.frames.nbytes / 2**20
        self.telemetry.say(f"{len(self.frames)} items decoded in {seconds:.0f} s into {size_mib:.0f} MiB")
        if decoded.left_out:
            count = len(decoded.left_out)
            self.telemetry.say(f"{count} {'clip is' if count == 1 else 'clips are'} left out: {decoded.left_out[0][1]}")
        self._accept_cached(decoded.bad, len(self.frames))
        return squares_in_memory(decoded, sampler, seed, self.device)

    def _take(self, samples: Squares) -> tuple[dict[str, Tensor], float]:
        return self.take_step(samples), 0.0

    def take_step(self, squares: Squares) -> dict[str, Tensor]:
        """Train on a rank's part of a step; returns what the log has of it, on the device."""
        config, objective = self.config, self.config.objective
        progress = self.step / self.steps
        set_rates(self.optimizer, rate_factor(self.step, self.steps, config.optimizer))
        may_flip = torch.ones(len(squares.pixels), dtype=torch.bool, device=self.device)
        self.draws.begin(self.step)
        pixels = self.jitter(self.augment(squares.pixels, squares.draws, may_flip), self.draws)
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
        self.tokenizer.bound_sharpness()
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

    def _validate(self) -> None:
        if not self.validation:
            return
        tokenizer = self.tokenizer if self.average is None else self.average.network
        results = self.validation.measure(tokenizer, self.device)
        epoch = self.epochs.passed(self.step)
        self.telemetry.validation(self.step, epoch, {path: {"reconstruction": m} for path, m in results.items()})
        names = short_names(results)
        for path, m in results.items():
            self.telemetry.say(
                f"epoch {epoch:.2f}  {names[path]}  PSNR {m['psnr']:.2f} dB (error {m['reconstruction_error']:.5f})"
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

    def _state(self) -> dict[str, Any]:
        return {
            "tokenizer": self.tokenizer.state_dict(),
            "average": self.average.network.state_dict() if self.average else None,
            "objective": {"counts": gather(self.objective.counts[None]).sum(dim=0)},  # of all ranks
            "optimizer": self.optimizer.state_dict(),
        }

    def _restore_state(self, state: dict[str, Any]) -> None:
        self.tokenizer.load_state_dict(state["tokenizer"])
        if self.average is not None:
            self.average.network.load_state_dict(state["average"])
        self.objective.load_state_dict(state["objective"])
        if not self.ranks.first:
            self.objective.counts.zero_()  # the first rank has those of all
        self.optimizer.load_state_dict(state["optimizer"])

    def _outcome(self) -> str:
        if not self.config.data.validation:
            return "data.validation names no source, so no tokenizer was saved"
        return f"the best tokenizer is in {self.directory / 'best'}"

    def _introduction(self) -> str:
        weights = sum(parameter.numel() for parameter in self.tokenizer.parameters())
        return (
            f"{weights / 1e6:.2f} M parameters, {self.config.visual_tokenizer.codebook_size} codes, "
            f"{len(self.frames)} items, {self.steps} steps of {self.config.training.batch_size} pictures of "
            f"{self.side} px ({self.config.training.epochs:g} epochs of {self.epochs.samples}), "
            f"{self.ranks.count} x {self.device.type}, {'bf16' if self.dtype else 'fp32'}; "
            f"from step {self.step}; into {self.directory}"
        )


def _create_optimizer(tokenizer: VisualTokenizer, config: OptimizerConfig) -> torch.optim.AdamW:
    """Convolutions are decayed; biases, the codes (whose length means nothing) and the sharpness are not."""
    decayed = [p for name, p in tokenizer.named_parameters() if p.ndim == 4]
    others = [p for name, p in tokenizer.named_parameters() if p.ndim != 4]
    groups = [
        {"params": parameters, "lr": config.learning_rate, "peak": config.learning_rate, "weight_decay": decay}
        for parameters, decay in ((decayed, config.weight_decay), (others, 0.0))
    ]
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.epsilon, fused=others[0].is_cuda)


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
