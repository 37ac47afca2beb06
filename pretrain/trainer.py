"""The training of a model.

    cots pretrain configs/cots_mini.yaml training.epochs=5                       # one process
    torchrun --nproc-per-node 2 -m pretrain configs/cots_mini.yaml               # one process a GPU

A run directory holds config.yaml, log.jsonl (see telemetry.py), report.html (its curves), checkpoints/ (the whole
state) and best/ (the model directory that did best on validation). A run goes on where it stopped with
training.resume=true.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cots.config import PretrainConfig
from cots.data.square_transform import SquareTransform
from cots.model.dual_encoder import DualEncoder
from cots.model.model_directory import save_model
from cots.model.open_clip_architecture import OPEN_CLIP
from cots.model.visual_tokenizer import VisualTokenizer, load_visual_tokenizer
from cots.objectives.collaborative import CollaborativeObjective
from pretrain.distributed import Ranks
from pretrain.flops import matrix_rate
from pretrain.loader import Batch, training_loader
from pretrain.loader_workers import start_server
from pretrain.model_card import model_card
from pretrain.network import TrainingNetwork, freeze_unused, token_grid
from pretrain.pixel_cache import PixelCache, cached_batches
from pretrain.run_log import short_names
from pretrain.start import starting_encoder, starting_tokenizer
from pretrain.step import TrainingStep, uses_bf16
from pretrain.step_cost import StepCost
from pretrain.stored_tokens import TokenizedPairs, tokenized_loader
from pretrain.training_run import TrainingRun, run_training
from pretrain.validation import Metrics, Validation, criterion


def pretrain(config: PretrainConfig) -> Path:
    """Train a model as configured; returns the run directory.

    Raises:
        ConfigError: settings that contradict each other or a run that is already there.
        SourceError: a source without pairs.
        TrainingError: the loss is no number, too many samples cannot be read, or the run cannot be written.
    """
    return run_training(Run, config)


class Run(TrainingRun[PretrainConfig, Batch]):
    """The training of a model."""

    worst = -1.0

    def __init__(self, config: PretrainConfig, ranks: Ranks) -> None:
        super().__init__(config, ranks, parts=config.training.accumulation)
        if self.device.type == "cuda" and config.data.workers and config.data.cache_side is None:
            # it imports what the loader's workers run while the networks are built
            start_server(["open_clip"] if config.model.text_tower.name.startswith(OPEN_CLIP) else [])
        self._open_sources()  # before networks are built that a checkpoint may not fit
        self.stepper = create_step(config, ranks)
        self.tokenizer = self.stepper.tokenizer
        self.cost: StepCost | None = None
        masked = config.objective.masked_modeling
        self.tokenized = self._tokenized_pairs() if masked.image_weight and masked.stored_tokens else None
        self.validation: Validation | None = None
        if ranks.first:
            image = config.model.image_tower
            transform = SquareTransform(image.image_size, image.resize)
            self.validation = Validation(config.data.validation, self.tokenizer, transform, config.data.workers)
        self._begin()

    @property
    def trained(self) -> nn.Module:
        return self.stepper.parallel

    def _tokenized_pairs(self) -> TokenizedPairs:
        data, seed = self.config.data, self.config.training.seed
        size = self.config.crop_size
        named_by = load_visual_tokenizer(self.config.objective.masked_modeling.visual_tokenizer).fingerprint()
        return TokenizedPairs(self.sources, self.tokenizer, data, size, self.stepper.grid, named_by, seed)

    def _samples(self) -> Iterator[Batch]:
        if (rate := matrix_rate(self.device)) is not None:
            self.cost = StepCost(self.stepper, self.config.training.batch_size // self.ranks.count)
            self.telemetry.utilisation(self.cost.per_item, rate)
        return (batch.to(self.device) for batch in self._batches())

    def _batches(self) -> Iterator[Batch]:
        data = self.config.data
        size = self.config.crop_size
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
        self._accept_cached(cache.bad, len(cache))
        return cached_batches(cache, data, sampler, size, self.config.training.seed)

    def _take(self, samples: Batch) -> tuple[dict[str, Tensor], float]:
        scalars = self.stepper.take(samples, self.step, self.steps)
        return scalars, self.cost.flops(samples) if self.cost else 0.0

    def _validate(self) -> None:
        validated = bool(self.config.data.validation)
        if not validated and self.step < self.steps:
            return
        with self.stepper.shipped_encoder() as encoder:
            if encoder is not None and validated:
                self._measure(encoder)
            elif encoder is not None:
                self._keep(encoder, {})  # nothing chose it, but it is what the training came to

    def _measure(self, network: DualEncoder) -> None:
        """Validate on the first rank, and keep the model if it is the best so far."""
        assert self.validation is not None
        results = self.validation.measure(network, self.device)
        score, epoch = criterion(results), self.epochs.passed(self.step)
        self.telemetry.validation(self.step, epoch, results)
        names = short_names(results)
        for path, metrics in results.items():
            both = "   ".join(
                f"{way.replace('_', ' ')} R@1/5/10 {m['R@1']:.1f} / {m['R@5']:.1f} / {m['R@10']:.1f}"
                for way, m in metrics.items()
            )
            self.telemetry.say(f"epoch {epoch:.2f}  {names[path]}  {both}")
        if score > self.best["criterion"]:
            self.best = {"criterion": score, "step": self.step, "results": results}
            self._keep(network, results)

    def _keep(self, network: DualEncoder, results: dict[str, Metrics]) -> None:
        dtype, card = self.config.training.weights_dtype, model_card(self.config, results)
        save_model(self.directory / "best", network, self.tokenizer, weights_dtype=dtype, card=card)

    def _state(self) -> dict[str, Any]:
        return self.stepper.state()

    def _restore_state(self, state: dict[str, Any]) -> None:
        self.stepper.restore(state)

    def _outcome(self) -> str:
        which = "best model" if self.config.data.validation else "last model, for data.validation names no source,"
        return f"the {which} is in {self.directory / 'best'}"

    def _introduction(self) -> str:
        weights = sum(parameter.numel() for parameter in self.stepper.network.encoder.parameters())
        pairs = sum(len(source) for source in self.sources)
        return (
            f"{weights / 1e6:.1f} M parameters, {pairs} items, "
            f"{self.steps} steps of {self.config.training.batch_size} pairs "
            f"({self.config.training.epochs:g} epochs of {self.epochs.samples}), "
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
