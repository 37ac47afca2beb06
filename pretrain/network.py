"""What learns: the dual encoder and the heads of the token level, as one module that DistributedDataParallel wraps."""

import copy
import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from cots.config import MaskedModelingConfig, PretrainConfig
from cots.data.masking import HiddenWords, patch_mask
from cots.errors import ConfigError
from cots.model.dual_encoder import DualEncoder
from cots.objectives.masked_modeling import MaskedModelingHead
from pretrain.batch_norms import still_statistics

Counts = tuple[int, ...] | None
Network = TypeVar("Network", bound=nn.Module)


@dataclass
class HiddenPatches:
    """Attributes:
    places: (B, K) int64, the hidden patches.
    targets: (B, K) int64, their visual tokens.
    grid: side of the grid that the places count through, row by row.
    """

    places: Tensor
    targets: Tensor
    grid: int


@dataclass
class NetworkInput:
    """Items of a batch, as `TrainingNetwork.forward` is given them.

    Attributes:
        pixels: (B, 3, S, S) or (B, F, 3, S, S) uint8.
        token_ids: (B * captions, L) int64, the captions of an item side by side.
        patches: of the B pictures; words: of the B first captions; None: nothing is hidden.
        counts: how many frames each item has, if not all F (see `Batch`).
    """

    pixels: Tensor
    token_ids: Tensor
    patches: HiddenPatches | None
    words: HiddenWords | None
    counts: Counts

    def split(self, parts: int) -> list["NetworkInput"]:
        """The items in so many equal parts, which the batch size is a multiple of."""
        size = len(self.pixels) // parts
        return [self._rows(slice(part * size, (part + 1) * size)) for part in range(parts)]

    def _rows(self, rows: slice) -> "NetworkInput":
        captions = len(self.token_ids) // len(self.pixels)
        patches, words = self.patches, self.words
        return NetworkInput(
            self.pixels[rows],
            self.token_ids[rows.start * captions : rows.stop * captions],
            patches and HiddenPatches(patches.places[rows], patches.targets[rows], patches.grid),
            words and HiddenWords(words.token_ids[rows], words.places[rows], words.targets[rows]),
            self.counts and self.counts[rows],
        )


@dataclass
class NetworkOutput:
    """Attributes:
    image: (B, D), text: (B * captions, D) float32, unit norm.
    masked_losses: (B,) float32, the weighted sum of the token level's losses; None if it is off.
    scalars: detached () values for the log.
    """

    image: Tensor
    text: Tensor
    masked_losses: Tensor | None
    scalars: dict[str, Tensor]


class TrainingNetwork(nn.Module):
    """The encoder, and a head for each kind of masked modelling whose weight is not 0."""

    def __init__(self, encoder: DualEncoder, config: MaskedModelingConfig, codebook: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = config
        dimension = encoder.config.embedding_dim
        self.image_head = (
            MaskedModelingHead(encoder.image_tower.width, dimension, codebook, tied=False)
            if config.image_weight
            else None
        )
        self.text_head = (
            MaskedModelingHead(encoder.text_tower.width, dimension, len(encoder.text_tower.word_embeddings), tied=True)
            if config.text_weight
            else None
        )

    def forward(
        self,
        pixels: Tensor,
        token_ids: Tensor,
        patches: HiddenPatches | None = None,
        words: HiddenWords | None = None,
        counts: Counts = None,
    ) -> NetworkOutput:
        """Encode a batch, and predict what is hidden of it.

        The masked passes take the global embeddings of the unmasked ones: nothing is encoded twice. An item's masked
        picture (the first frame of a clip) meets its first caption, and its masked first caption the picture.

        The arguments are the attributes of `NetworkInput`.
        """
        image = encode_items(self.encoder, pixels, counts)
        text = self.encoder.encode_text(token_ids).embedding
        captions = len(token_ids) // len(pixels)
        losses: Tensor | None = None
        scalars: dict[str, Tensor] = {}
        if self.image_head is not None and patches is not None:
            first = pixels if pixels.ndim == 4 else pixels[:, 0]
            with still_statistics(self.encoder.image_tower):
                tokens = self.encoder.encode_image(first, patch_mask(patches.places, patches.grid)).tokens
            output = self.image_head(tokens, patches.places, patches.targets, text[::captions])
            losses = self.config.image_weight * output.losses
            scalars["loss_masked_image"] = output.losses.detach().mean()
            scalars["masked_image_accuracy"] = output.accuracy
        if self.text_head is not None and words is not None:
            tokens = self.encoder.encode_text(words.token_ids).tokens
            weight = self.encoder.text_tower.word_embeddings
            output = self.text_head(tokens, words.places, words.targets, image, weight)
            weighted = self.config.text_weight * output.losses
            losses = weighted if losses is None else losses + weighted
            scalars["loss_masked_text"] = output.losses.detach().mean()
            scalars["masked_text_accuracy"] = output.accuracy
        return NetworkOutput(image, text, losses, scalars)


def encode_items(encoder: DualEncoder, pixels: Tensor, counts: Counts) -> Tensor:
    """(B, D) embeddings of pictures (B, 3, S, S), or of items of up to F frames (B, F, 3, S, S)."""
    if pixels.ndim == 4:
        return encoder.encode_image(pixels).embedding
    return encoder.encode_video(pixels, counts)


@torch.no_grad()
def token_grid(encoder: DualEncoder, config: PretrainConfig) -> int:
    """Tokens a side that the image tower makes of a training crop.

    Counted, not divided: most convolutional networks round their map up, 65 px at a stride of 32 to three tokens.

    Raises:
        ConfigError: the tower does not take crops of another size than its own.
    """
    size, own = config.data.image_size, config.model.image_tower
    if size is None or size == own.image_size:
        return encoder.image_tower.grid
    training = encoder.training
    try:
        tokens = encoder.eval().encode_image(torch.zeros(1, 3, size, size, dtype=torch.uint8)).tokens
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"data.image_size is {size}, but {own.name} takes pictures of {own.image_size} px alone; leave it out, or "
            f"set model.image_tower.image_size={size} too."
        ) from error
    encoder.train(training)
    return math.isqrt(tokens.shape[1])


def freeze_unused(encoder: DualEncoder, config: PretrainConfig) -> None:
    """Freeze what no embedding depends on, for DistributedDataParallel would wait for its gradients: layers of a timm
    network behind its features, a temporal transformer where items have one frame.
    """
    size = config.crop_size
    frames = (2,) if config.data.frames_per_item > 1 else ()
    outline = without_data(encoder).eval()
    image = outline.encode_image(torch.zeros(1, *frames, 3, size, size, dtype=torch.uint8, device="meta"))
    text = outline.encode_text(torch.ones(1, config.model.text_tower.max_length, dtype=torch.int64, device="meta"))
    outputs = image.embedding, image.tokens, text.embedding, text.tokens
    torch.stack([output.sum() for output in outputs]).sum().backward()
    for parameter, outlined in zip(encoder.parameters(), outline.parameters(), strict=True):
        if outlined.grad is None:
            parameter.requires_grad_(False)


def without_data(network: Network) -> Network:
    """A copy that knows the shapes of its weights and buffers alone (the meta device), and takes no memory."""
    tensors: list[Tensor] = [*network.parameters(), *network.buffers()]
    shapes = [torch.empty_like(tensor, device="meta") for tensor in tensors]
    outlines = [
        nn.Parameter(shape) if isinstance(tensor, nn.Parameter) else shape for tensor, shape in zip(tensors, shapes)
    ]
    return copy.deepcopy(network, {id(tensor): outline for tensor, outline in zip(tensors, outlines)})
