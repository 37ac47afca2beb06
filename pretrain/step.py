"""One step of training, from a batch to updated weights, averages and queues."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cots.config import PretrainConfig
from cots.data.masking import HiddenWords, hide_patches, hide_words
from cots.data.sample_draws import SampleDraws
from cots.data.transforms import ColorJitter
from cots.model.caption_tokenizer import CaptionTokenizer
from cots.model.dual_encoder import DualEncoder
from cots.model.visual_tokenizer import VisualTokenizer
from cots.objectives.collaborative import CollaborativeObjective
from cots.objectives.gathering import gather
from cots.objectives.retrieval import MomentumFeatures, PairFeatures
from pretrain.batch_norms import average_statistics, still_statistics
from pretrain.determinism import compile_options
from pretrain.distributed import Ranks
from pretrain.gradient_caching import EmbeddingCache
from pretrain.loader import Batch
from pretrain.momentum import MovingAverage
from pretrain.network import HiddenPatches, NetworkInput, TrainingNetwork, encode_items, without_data
from pretrain.optimizer import create_optimizer, rate_factor, set_rates
from pretrain.sharding import (
    clip_gradients,
    layers_of,
    load_whole,
    load_whole_optimizer,
    shard_average,
    shard_network,
    whole,
)
from pretrain.working_copy import WorkingCopy

Scalars = dict[str, Tensor]


@dataclass
class Losses:
    """Attributes:
    total: () float32, of this rank, to be differentiated.
    features: what goes into the queues after the step.
    scalars: detached () values for the log.
    """

    total: Tensor
    features: PairFeatures
    scalars: Scalars


class TrainingStep:
    """All that changes from step to step: weights, averages, optimizer state, queues.

    Attributes:
        network: the fp32 weights that are optimized.
        momentum: the momentum towers, if a level looks at them.
        average: the slow average that is shipped, if there is one.
        skeleton: the network without data, on the meta device.
        grid: tokens a side that the image tower makes of a crop, which may be smaller than what it will see later.
        sharded: each rank holds a part of all these.
        low_precision: the towers compute in bf16.
    """

    def __init__(
        self,
        network: TrainingNetwork,
        objective: CollaborativeObjective,
        config: PretrainConfig,
        ranks: Ranks,
        tokenizer: CaptionTokenizer,
        visual_tokenizer: VisualTokenizer | None,
        grid: int,
    ) -> None:
        training = config.training
        self.config, self.ranks, self.device = config, ranks, ranks.device
        self.network, self.objective = network, objective
        self.tokenizer, self.visual_tokenizer, self.grid = tokenizer, visual_tokenizer, grid
        self.sharded = training.sharding == "sharded" and ranks.count > 1
        self.low_precision = uses_bf16(training.precision, self.device)
        dtype = torch.bfloat16 if self.low_precision else None
        self.skeleton = without_data(network)
        if self.sharded:
            network.to(memory_format=torch.contiguous_format)  # FSDP splits weights row by row
        momentum = copy.deepcopy(network.encoder) if objective.uses_momentum else None
        average = copy.deepcopy(network.encoder) if training.averaging else None
        self._whole_encoder: DualEncoder | None = None
        if self.sharded:
            if ranks.first:
                self._whole_encoder = copy.deepcopy(network.encoder).cpu().eval().requires_grad_(False)
            shard_network(network, dtype)
            for follower in (momentum, average):
                if follower is not None:
                    shard_average(follower, dtype)
            dtype = None  # what is shared out is rounded as it is gathered
        encoder = network.encoder
        self.momentum = MovingAverage(encoder, config.objective.momentum, momentum) if momentum is not None else None
        self.average = MovingAverage(encoder, training.averaging, average) if average is not None else None
        heads = [head for head in (network.image_head, network.text_head) if head is not None]
        self.optimizer = create_optimizer(network.encoder, nn.ModuleList([objective, *heads]), config.optimizer)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.working = WorkingCopy(network, dtype)
        self.momentum_working = WorkingCopy(momentum, dtype) if momentum is not None else None
        self.jitter = ColorJitter(config.data.augmentation.color, self.device)
        self.draws = SampleDraws(training.seed, self.device, ranks.rank, ranks.count)
        self.special_ids = torch.tensor(tokenizer.special_ids, device=self.device)
        if training.activation_checkpointing:
            self.working.network.encoder.set_activation_checkpointing(True)
        if training.compile:
            _compile(self.working.network, self.sharded)
            if self.momentum_working is not None:
                _compile_encoder(self.momentum_working.network, self.sharded)
            if visual_tokenizer is not None:
                visual_tokenizer.encoder.compile(dynamic=False, options=compile_options())
        self.parallel: nn.Module = self.working.network
        if ranks.count > 1 and not self.sharded:
            # the views save a copy of all gradients; the buckets are reduced while the backward pass goes on
            parallel = DistributedDataParallel(self.working.network, gradient_as_bucket_view=True)
            # torch 2.13 gave the argument another name; the attribute has this one in every version
            parallel.broadcast_buffers = False
            self.parallel = parallel

    def take(self, batch: Batch, step: int, steps: int) -> Scalars:
        """Train on one batch; returns values for the log, still on the device."""
        config = self.config
        set_rates(self.optimizer, rate_factor(step, steps, config.optimizer))
        self.draws.begin(step)
        batch = replace(batch, pixels=self.augment(batch.pixels))
        features, scalars = self._backward(batch, step / steps)
        scalars["gradient_norm"] = self._update()
        if self.average is not None:
            if step < config.training.averaging_start * steps:
                self.average.reset()
            else:
                self.average.update()
        self.objective.enqueue(features)
        return scalars

    def outlined(self) -> "TrainingStep":
        """A twin without data (the meta device), of which `losses` can be asked: it computes shapes alone."""
        meta = torch.device("meta")
        twin = copy.copy(self)
        network = copy.deepcopy(self.skeleton)
        for outlined, parameter in zip(network.parameters(), self.network.parameters()):
            outlined.requires_grad_(parameter.requires_grad)
        twin.parallel = network
        twin.objective = without_data(self.objective)
        if self.visual_tokenizer is not None:
            twin.visual_tokenizer = without_data(self.visual_tokenizer)
        if self.momentum_working is not None:
            twin.momentum_working = WorkingCopy(copy.deepcopy(network.encoder).eval(), None)
        twin.draws, twin.special_ids = SampleDraws(0, meta), self.special_ids.to(meta)
        return twin

    @contextmanager
    def shipped_encoder(self) -> Iterator[DualEncoder | None]:
        """The encoder that is validated and saved, whole and in evaluation mode, on the first rank; None on others.

        It is the slow average if there is one. All ranks enter together.
        """
        encoder = self.network.encoder if self.average is None else self.average.network
        if self.sharded:
            weights = whole(encoder.state_dict(), self.ranks.first)
            if self._whole_encoder is not None:
                self._whole_encoder.load_state_dict(weights)
                self._whole_encoder.to(self.device)
            yield self._whole_encoder
            if self._whole_encoder is not None:
                self._whole_encoder.cpu()
            return
        encoder.eval()
        yield encoder if self.ranks.first else None
        self.network.encoder.train()

    def state(self) -> dict[str, Any]:
        """Everything that a step changes, for a checkpoint: whole on the first rank, shared out or not.

        All ranks call it together.
        """
        state = {
            "network": self.network.state_dict(),
            "momentum": self.momentum.network.state_dict() if self.momentum else None,
            "average": self.average.network.state_dict() if self.average else None,
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        return whole(state, self.ranks.first) if self.sharded else state

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned on the first rank."""
        load_whole(self.network, state["network"])
        if self.momentum is not None:
            load_whole(self.momentum.network, state["momentum"])
        if self.average is not None:
            load_whole(self.average.network, state["average"])
        self.objective.load_state_dict(state["objective"])
        load_whole_optimizer(self.optimizer, state["optimizer"])
        self.working.take_weights()
        if self.momentum_working is not None:
            self.momentum_working.take_weights()

    def augment(self, pixels: Tensor) -> Tensor:
        """Colour jitter on the device, one draw for all frames of a clip; channels last for convolutions."""
        frames = pixels.shape[1] if pixels.ndim == 5 else 1
        if frames > 1:
            shape = pixels.shape
            tall = pixels.transpose(1, 2).reshape(shape[0], 3, frames * shape[3], shape[4])
            return self.jitter(tall, self.draws).view(shape[0], 3, frames, *shape[3:]).transpose(1, 2).contiguous()
        return self.jitter(pixels, self.draws).contiguous(memory_format=torch.channels_last)

    def losses(self, batch: Batch, progress: float) -> Losses:
        """All levels' losses of an augmented batch, in one part. `progress` is the share of the training done."""
        given = self.hide(batch)
        output = self.parallel(given.pixels, given.token_ids, given.patches, given.words, given.counts)
        features = self.pair_features(output.image, output.text, batch.item_ids, [given])
        result = self.objective(features, progress)
        total = result.loss if output.masked_losses is None else result.loss + output.masked_losses.mean()
        return Losses(total, features, {"loss": total.detach(), **result.scalars, **output.scalars})

    def hide(self, batch: Batch) -> NetworkInput:
        """Draw what the token level hides of the pictures (of a clip, its first frame) and of their first captions."""
        masked = self.config.objective.masked_modeling
        pixels, token_ids = batch.pixels, batch.token_ids
        patches: HiddenPatches | None = None
        words: HiddenWords | None = None
        if self.visual_tokenizer is not None:
            first = pixels if pixels.ndim == 4 else pixels[:, 0]
            places = hide_patches(len(first), self.grid, masked.image_share, self.draws)
            tokens = batch.visual_tokens
            if tokens is None:
                tokens = self.visual_tokenizer.tokens(first, self.grid)
            patches = HiddenPatches(places, tokens.gather(1, places), self.grid)
        if masked.text_weight:
            captions = len(token_ids) // len(pixels)
            tokenizer = self.tokenizer
            words = hide_words(
                token_ids[::captions],
                masked.text_share,
                tokenizer.mask_id,
                self.special_ids,
                tokenizer.vocabulary,
                self.draws,
            )
        return NetworkInput(pixels, token_ids, patches, words, batch.counts)

    def pair_features(
        self, image: Tensor, text: Tensor, item_ids: Tensor, parts: Sequence[NetworkInput]
    ) -> PairFeatures:
        """The pairs of a batch. An item with several captions becomes as many pairs, its picture encoded once.

        Args:
            image: (B, D), text: (B * captions, D), what the learning towers make of the items.
            item_ids: (B,).
            parts: the items, which the momentum towers encode a part at a time.
        """
        captions = len(text) // len(image)
        pair_ids = item_ids.repeat_interleave(captions)
        momentum: MomentumFeatures | None = None
        if self.momentum_working is not None:
            encoded = [_embeddings(self.momentum_working.network, part) for part in parts]
            slow_image, slow_text = (torch.cat(side) for side in zip(*encoded))
            momentum = MomentumFeatures(
                gather(slow_image.repeat_interleave(captions, dim=0)),
                gather(slow_text),
            )
        return PairFeatures(
            image=image.repeat_interleave(captions, dim=0),
            text=text,
            item_ids=pair_ids,
            all_item_ids=gather(pair_ids),
            momentum=momentum,
        )

    def _backward(self, batch: Batch, progress: float) -> tuple[PairFeatures, Scalars]:
        """Give the weights the gradient of a batch's losses, in one part or in several."""
        accumulation = self.config.training.accumulation
        if accumulation == 1:
            losses = self.losses(batch, progress)
            recomputing = self.config.training.activation_checkpointing
            with still_statistics(self.working.network) if recomputing else nullcontext():
                losses.total.backward()
            return losses.features, losses.scalars
        parts = self.hide(batch).split(accumulation)
        cache = EmbeddingCache(self.working.network, parts)
        features = self.pair_features(cache.image, cache.text, batch.item_ids, parts)
        result = self.objective(features, progress)
        result.loss.backward()
        masked_loss, scalars = cache.backward(self.parallel)
        return features, {"loss": result.loss.detach() + masked_loss, **result.scalars, **scalars}

    def _update(self) -> Tensor:
        """Clip, step, and let the averages and the working copies follow; returns the norm of the gradient."""
        self.working.give_gradients()
        if self.ranks.count > 1:
            average_statistics(self.working.network)
            for parameter in self.objective.parameters():  # the temperature lies outside of what DDP or FSDP reduces
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.ranks.count
        clip = clip_gradients if self.sharded else nn.utils.clip_grad_norm_
        norm = clip(self.parameters, self.config.optimizer.clip_norm or math.inf)
        self.optimizer.step()
        self.objective.bound_temperature()
        self.optimizer.zero_grad(set_to_none=True)
        self.working.take_weights()
        if self.momentum is not None and self.momentum_working is not None:
            self.momentum.update()
            self.momentum_working.take_weights()
        return norm.detach()


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether the towers compute in bf16: asked for, or `auto` on a GPU."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def _compile(network: TrainingNetwork, by_layer: bool) -> None:
    # Else a tower under DistributedDataParallel becomes a graph for every 25 MB of gradients, so that these are reduced
    # while others are computed: half as long again to compile, for what NVLink takes half a millisecond for.
    torch._dynamo.config.optimize_ddp = False
    _compile_encoder(network.encoder, by_layer)
    for head in (network.image_head, network.text_head):
        if head is not None:
            head.compile(dynamic=False, options=compile_options())


def _compile_encoder(encoder: DualEncoder, by_layer: bool) -> None:
    """The towers, each one graph for pictures seen whole and in part (two, if it has batch norms that learn: see
    `still_statistics`). All shapes are fixed by the configuration.

    Weights that are shared out are gathered between layers, outside of any graph: `by_layer`, each layer is a graph.
    """
    options = compile_options()
    if by_layer:
        for layer in layers_of(encoder):
            layer.forward = torch.compile(layer.forward, dynamic=False, options=options)
    else:
        encoder.image_tower.compile(dynamic=False, options=options)
        encoder.text_tower.compile(dynamic=False, options=options)
    prepare = torch.compile(encoder.prepare_pixels, dynamic=False, options=options)
    encoder.prepare_pixels = prepare  # type: ignore[method-assign]


@torch.no_grad()
def _embeddings(encoder: DualEncoder, part: NetworkInput) -> tuple[Tensor, Tensor]:
    return encode_items(encoder, part.pixels, part.counts), encoder.encode_text(part.token_ids).embedding
