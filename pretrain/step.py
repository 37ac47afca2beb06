"""One step of training, from a batch to updated weights, averages and queues."""

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
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
from cots.objectives.retrieval import PairFeatures
from pretrain.distributed import Ranks, average_statistics
from pretrain.loader import Batch
from pretrain.momentum import MovingAverage
from pretrain.network import Counts, HiddenPatches, NetworkOutput, TrainingNetwork, encode_items, without_data
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


class TrainingStep:
    """All that changes from step to step: weights, averages, optimizer state, queues.

    Attributes:
        network: the fp32 weights that are optimized.
        momentum: the momentum towers; `average`: the slow average that is shipped, if there is one.
        outline: the network without data, on the meta device.
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
        self.outline = without_data(network)
        self._whole_encoder: DualEncoder | None = None
        if self.sharded:
            network.to(memory_format=torch.contiguous_format)  # FSDP splits weights row by row
        followers = [copy.deepcopy(network.encoder) for _ in range(2 if training.averaging else 1)]
        if self.sharded:
            if ranks.first:
                self._whole_encoder = copy.deepcopy(followers[0]).cpu().eval().requires_grad_(False)
            shard_network(network, dtype)
            for follower in followers:
                shard_average(follower, dtype)
            dtype = None  # what is shared out is rounded as it is gathered
        self.momentum = MovingAverage(network.encoder, config.objective.momentum, followers[0])
        self.average = MovingAverage(network.encoder, training.averaging, followers[1]) if training.averaging else None
        heads = [head for head in (network.image_head, network.text_head) if head is not None]
        self.optimizer = create_optimizer(network.encoder, nn.ModuleList([objective, *heads]), config.optimizer)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.working = WorkingCopy(network, dtype)
        self.momentum_working = WorkingCopy(self.momentum.network, dtype)
        self.jitter = ColorJitter(config.data.augmentation.color)
        self.draws = SampleDraws(training.seed, self.device, ranks.rank, ranks.count)
        if training.activation_checkpointing:
            self.working.network.encoder.set_activation_checkpointing(True)
        if training.compile:
            _compile(self.working.network, self.sharded)
            _compile_encoder(self.momentum_working.network, self.sharded)
            if visual_tokenizer is not None:
                visual_tokenizer.encoder.compile(dynamic=False)
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
        pixels = self.augment(batch.pixels)
        patches, words = self.hide(pixels, batch.token_ids, batch.visual_tokens)
        if config.training.accumulation == 1:
            output = self.parallel(pixels, batch.token_ids, patches, words, batch.counts)
            features = self.pair_features(output, replace(batch, pixels=pixels))
            result = self.objective(features, step / steps)
            loss = result.loss if output.masked_losses is None else result.loss + output.masked_losses.mean()
            loss.backward()
            scalars = {"loss": loss.detach(), **result.scalars, **output.scalars}
        else:
            features, scalars = self._accumulate(batch, pixels, patches, words, step / steps)
        scalars["gradient_norm"] = self._update()
        if self.average is not None:
            if step < config.training.averaging_start * steps:
                self.average.reset()
            else:
                self.average.update()
        self.objective.enqueue(features)
        return scalars

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
            "momentum": self.momentum.network.state_dict(),
            "average": self.average.network.state_dict() if self.average else None,
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        return whole(state, self.ranks.first) if self.sharded else state

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned on the first rank."""
        load_whole(self.network, state["network"])
        load_whole(self.momentum.network, state["momentum"])
        if self.average is not None:
            load_whole(self.average.network, state["average"])
        self.objective.load_state_dict(state["objective"])
        load_whole_optimizer(self.optimizer, state["optimizer"])
        self.working.take_weights()
        self.momentum_working.take_weights()

    def augment(self, pixels: Tensor) -> Tensor:
        """Colour jitter on the device, one draw for all frames of a clip; channels last for convolutions."""
        frames = pixels.shape[1] if pixels.ndim == 5 else 1
        if frames > 1:
            shape = pixels.shape
            tall = pixels.transpose(1, 2).reshape(shape[0], 3, frames * shape[3], shape[4])
            return self.jitter(tall, self.draws).view(shape[0], 3, frames, *shape[3:]).transpose(1, 2).contiguous()
        return self.jitter(pixels, self.draws).contiguous(memory_format=torch.channels_last)

    def hide(
        self, pixels: Tensor, token_ids: Tensor, stored: Tensor | None = None
    ) -> tuple[HiddenPatches | None, HiddenWords | None]:
        """Draw what the token level hides of the pictures (of a clip, its first frame) and of their first captions.

        Args:
            stored: the visual tokens, (B, grid * grid), if they need not be computed.
        """
        masked = self.config.objective.masked_modeling
        patches: HiddenPatches | None = None
        words: HiddenWords | None = None
        if self.visual_tokenizer is not None:
            first = pixels if pixels.ndim == 4 else pixels[:, 0]
            places = hide_patches(len(first), self.grid, masked.image_share, self.draws)
            tokens = self.visual_tokenizer.tokens(first, self.grid) if stored is None else stored
            patches = HiddenPatches(places, tokens.gather(1, places), self.grid)
        if masked.text_weight:
            captions = len(token_ids) // len(pixels)
            tokenizer = self.tokenizer
            words = hide_words(
                token_ids[::captions],
                masked.text_share,
                tokenizer.mask_id,
                tokenizer.special_ids,
                tokenizer.vocabulary,
                self.draws,
            )
        return patches, words

    def pair_features(
        self, output: NetworkOutput, batch: Batch, parts: int = 1, momentum: DualEncoder | None = None
    ) -> PairFeatures:
        """An item with several captions becomes as many pairs, its picture encoded once.

        The momentum towers (or other ones in their place) encode the batch in `parts`.
        """
        momentum = self.momentum_working.network if momentum is None else momentum
        captions = len(batch.token_ids) // len(batch.pixels)
        item_ids = batch.item_ids.repeat_interleave(captions)
        image_momentum, text_momentum = output.image.detach(), output.text.detach()
        if self.objective.uses_momentum:
            encoded = [
                _embeddings(momentum, *part)
                for part in zip(
                    batch.pixels.chunk(parts), batch.token_ids.chunk(parts), _chunk_counts(batch.counts, parts)
                )
            ]
            image_momentum, text_momentum = (torch.cat(side) for side in zip(*encoded))
        return PairFeatures(
            image=output.image.repeat_interleave(captions, dim=0),
            text=output.text,
            item_ids=item_ids,
            image_momentum=gather(image_momentum.repeat_interleave(captions, dim=0)),
            text_momentum=gather(text_momentum),
            all_item_ids=gather(item_ids),
        )

    def _accumulate(
        self,
        batch: Batch,
        pixels: Tensor,
        patches: HiddenPatches | None,
        words: HiddenWords | None,
        progress: float,
    ) -> tuple[PairFeatures, Scalars]:
        """Gradient caching (Gao et al. 2021): the loss of the whole batch, with the memory of a part of it.

        All parts are embedded, the loss gives the gradient of every embedding, and each part is encoded again and
        differentiated with the gradients of its own embeddings. The second encoding draws the dropout of the first.
        """
        parts = self.config.training.accumulation
        network = self.working.network
        pieces = list(zip(pixels.chunk(parts), batch.token_ids.chunk(parts)))
        counts = _chunk_counts(batch.counts, parts)
        states, first = [], []
        for index, part in enumerate(pieces):
            states.append(_random_state(self.device))
            # with the graph of the second encoding, so that a compiled one draws the same dropout; it is dropped here
            output = network(*part, counts=counts[index])
            first.append((output.image.detach(), output.text.detach()))
            del output  # or the graphs of two parts would be there at once
        image, text = (torch.cat(side).requires_grad_() for side in zip(*first))
        features = self.pair_features(NetworkOutput(image, text, None, {}), replace(batch, pixels=pixels), parts)
        result = self.objective(features, progress)
        result.loss.backward()
        assert image.grad is not None
        assert text.grad is not None
        scalars = {**result.scalars}
        total = result.loss.detach()
        hidden = _chunk_hidden(patches, words, parts)
        for index, part in enumerate(pieces):
            _set_random_state(self.device, states[index])
            last = index == parts - 1
            synchronized: AbstractContextManager = nullcontext()
            if isinstance(self.parallel, DistributedDataParallel) and not last:
                synchronized = self.parallel.no_sync()
            with synchronized:
                output = self.parallel(*part, *hidden[index], counts[index])
                surrogate = (output.image * image.grad.chunk(parts)[index]).sum()
                surrogate = surrogate + (output.text * text.grad.chunk(parts)[index]).sum()
                if output.masked_losses is not None:
                    share = output.masked_losses.sum() / len(pixels)
                    surrogate = surrogate + share
                    total = total + share.detach()
                surrogate.backward()
            for name, value in output.scalars.items():
                scalars[name] = scalars.get(name, 0) + value * len(part[0]) / len(pixels)
        return features, {"loss": total, **scalars}

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
        if self.objective.uses_momentum:
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
            head.compile(dynamic=False)


def _compile_encoder(encoder: DualEncoder, by_layer: bool) -> None:
    """The towers, each one graph for pictures seen whole and in part. All shapes are fixed by the configuration.

    Weights that are shared out are gathered between layers, outside of any graph: `by_layer`, each layer is a graph.
    """
    if by_layer:
        for layer in layers_of(encoder):
            layer.forward = torch.compile(layer.forward, dynamic=False)
    else:
        encoder.image_tower.compile(dynamic=False)
        encoder.text_tower.compile(dynamic=False)
    encoder.prepare_pixels = torch.compile(encoder.prepare_pixels, dynamic=False)  # type: ignore[method-assign]


@torch.no_grad()
def _embeddings(encoder: DualEncoder, pixels: Tensor, token_ids: Tensor, counts: Counts) -> tuple[Tensor, Tensor]:
    return encode_items(encoder, pixels, counts), encoder.encode_text(token_ids).embedding


def _chunk_counts(counts: Counts, parts: int) -> list[Counts]:
    if counts is None:
        return [None] * parts
    size = -(-len(counts) // parts)
    return [counts[start : start + size] for start in range(0, len(counts), size)]


def _chunk_hidden(
    patches: HiddenPatches | None, words: HiddenWords | None, parts: int
) -> list[tuple[HiddenPatches | None, HiddenWords | None]]:
    chunked: list[tuple[HiddenPatches | None, HiddenWords | None]] = [(None, None)] * parts
    if patches is not None:
        own = zip(patches.places.chunk(parts), patches.targets.chunk(parts))
        chunked = [(HiddenPatches(*piece, patches.grid), None) for piece in own]
    if words is not None:
        pieces = zip(words.token_ids.chunk(parts), words.places.chunk(parts), words.targets.chunk(parts))
        chunked = [(first, HiddenWords(*piece)) for (first, _), piece in zip(chunked, pieces)]
    return chunked


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
