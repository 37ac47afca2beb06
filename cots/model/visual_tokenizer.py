"""The visual tokenizer: a discrete VAE whose codes name the patches of a picture.

An encoder of residual convolutions turns every patch x_n of `stride` x `stride` pixels (with what surrounds it) into a
point z_n of the unit sphere, on which the K code vectors e_k lie too. The patch's distribution over the codes is

    q(k | x, n) = softmax_k( s <z_n, e_k> ),        s a learned sharpness,

its token is argmax_k <z_n, e_k>, and the decoder paints the picture from code vectors alone. In training the vector of
a patch is drawn by the Gumbel-softmax (Jang et al. 2017; Maddison et al. 2017) at temperature t,

    v_n = sum_k y_nk e_k,    y_n = softmax_k( (log q(k | x, n) + g_nk) / t ),    g_nk ~ Gumbel(0, 1),

which becomes a single code as t -> 0, and the evidence lower bound is maximised (Ramesh et al. 2021, equation 1):

    L = R(x, decoder(v)) + b mean_n KL( q(. | x, n) || uniform ),    KL(q || uniform) = log K + sum_k q_k log q_k.

The terms and their weights are in pretrain/tokenizer_objective.py.

What keeps the codebook from collapsing here is that codes are told apart by angle and are the very vectors which the
decoder reads (Yu et al. 2022, ViT-VQGAN, have both for a VQ-VAE): with a free linear map to logits instead, the codes
that win early get longer weights, win more, and are the only ones that the decoder learns.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from cots.embedded import EMBEDDED_VISUAL_TOKENIZER
from cots.errors import ConfigError, ModelError
from cots.full_precision import full_precision
from cots.model.model_directory import fingerprint_of, load_weights, write_weights, write_whole
from cots.settings import validate_config
from cots.tokenizer_config import VisualTokenizerConfig

FORMAT = 1
_FIRST_SHARPNESS = 30.0
_MAX_SHARPNESS = 100.0
_SCORES_AT_ONCE = 2**28  # 1 GiB of float32


@dataclass
class RelaxedPicture:
    """Attributes:
    reconstruction: (B, 3, S, S), pixel values in [-1, 1].
    log_probabilities: (B * N, K) float32, of every patch over the codes, row by row of every picture's grid.
    features: (B * N, D) float32, unit norm: where the patches lie.
    """

    reconstruction: Tensor
    log_probabilities: Tensor
    features: Tensor


class VisualTokenizer(nn.Module):
    """A discrete VAE; see the module's docstring."""

    def __init__(self, config: VisualTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        levels = int(math.log2(config.stride))
        # channels from the finest level (patches of 2 x 2 pixels) to the token grid
        channels = [max(config.min_width, config.width >> (levels - 1 - level)) for level in range(levels)]
        self.encoder = _encoder(channels, config.blocks, config.code_dim)
        self.decoder = _decoder(channels, config.blocks, config.code_dim)
        self.codes = nn.Parameter(F.normalize(torch.randn(config.codebook_size, config.code_dim), dim=1))
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(_FIRST_SHARPNESS)))
        self.apply(_initialise)

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def stride(self) -> int:
        return self.config.stride

    def forward(self, pixels: Tensor, temperature: float, *, straight_through: bool = False) -> RelaxedPicture:
        """Encode, draw and paint pictures (B, 3, S, S) uint8, S a multiple of the stride.

        With `straight_through` the decoder sees the code that was drawn, and the gradient is the mixture's.
        """
        features = self.encode(pixels)
        with full_precision(pixels.device):
            codes = F.normalize(self.codes.float(), dim=1)
            sharpness = self.log_sharpness.float().exp()
            log_probabilities = F.log_softmax(sharpness * (features @ codes.T), dim=1)
            weights = gumbel_softmax(log_probabilities, temperature, straight_through=straight_through)
            vectors = weights @ codes
        grid = pixels.shape[-2] // self.stride, pixels.shape[-1] // self.stride
        return RelaxedPicture(self._paint(vectors, grid), log_probabilities, features)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B * N, D) float32, unit norm: the points of the patches, row by row.

        Raises:
            ModelError: S is not a multiple of the stride.
        """
        height, width = pixels.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ModelError(
                f"Pictures of {width} x {height} px cannot be cut into patches of {self.stride} x {self.stride}; give "
                f"sides that are multiples of {self.stride}."
            )
        dtype = self.codes.dtype
        scaled = (pixels.to(dtype) / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        return F.normalize(self.encoder(scaled).permute(0, 2, 3, 1).flatten(0, 2).float(), dim=1)

    @torch.no_grad()
    def bound_sharpness(self) -> None:
        """Put a sharpness that a step took too high back onto the bound: the parameter itself, for what is clamped in
        `forward` has no gradient beyond the bound and would never come back."""
        self.log_sharpness.clamp_(max=math.log(_MAX_SHARPNESS))

    @torch.no_grad()
    def tokens(self, pixels: Tensor, grid: int) -> Tensor:
        """The visual tokens of pictures.

        Args:
            pixels: (B, 3, S, S) uint8 of any side; resized (bilinear, antialiased) to grid * stride first.
            grid: patches a side.

        Returns:
            (B, grid * grid) int64 in [0, codebook_size), row by row.

        Raises:
            ModelError: the grid has no patches.
        """
        if grid < 1:
            raise ModelError(f"A grid of {grid} x {grid} has no patches; give the image tower's.")
        side = grid * self.stride
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(pixels.float(), size=(side, side), mode="bilinear", antialias=True)
        features = self.encode(pixels)
        with full_precision(pixels.device):
            codes = F.normalize(self.codes.float(), dim=1).T
            parts = features.split(max(1, _SCORES_AT_ONCE // self.codebook_size))
            nearest = torch.cat([(part @ codes).argmax(dim=1) for part in parts])
        return nearest.view(len(pixels), grid * grid)

    @torch.no_grad()
    def reconstruct(self, tokens: Tensor) -> Tensor:
        """Paint pictures from tokens alone: (B, N) int64, N a square -> (B, 3, S, S) float32 in [0, 1]."""
        side = math.isqrt(tokens.shape[1])
        vectors = F.normalize(self.codes.float(), dim=1)[tokens.flatten()]
        return ((self._paint(vectors, (side, side)).float() + 1) / 2).clamp(0, 1)

    def fingerprint(self) -> str:
        """32 hexadecimal digits over weights and stride: other digits, other tokens."""
        return fingerprint_of(self.state_dict(), {"stride": self.stride}, b"")

    def _paint(self, vectors: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B * N, D), N = grid[0] * grid[1] -> (B, 3, S, S) in about [-1, 1]."""
        # unit vectors of D entries have a variance of 1 / D; the decoder starts from entries of variance 1
        scaled = (vectors * self.config.code_dim**0.5).to(self.codes.dtype)
        return self.decoder(scaled.view(-1, *grid, self.config.code_dim).permute(0, 3, 1, 2))


def gumbel_softmax(log_probabilities: Tensor, temperature: float, *, straight_through: bool = False) -> Tensor:
    """A draw from each row's distribution, relaxed to a mixture: (M, K) float32 -> (M, K), rows sum to 1.

    As the temperature goes to 0 the mixture becomes the one code that is largest after adding Gumbel noise, which is
    an exact draw. With `straight_through` that code is returned, with the mixture's gradient.
    """
    noise = -torch.empty_like(log_probabilities).exponential_().log()
    mixture = F.softmax((log_probabilities + noise) / temperature, dim=-1)
    if not straight_through:
        return mixture
    drawn = torch.zeros_like(mixture).scatter_(-1, mixture.argmax(dim=-1, keepdim=True), 1.0)
    return drawn + (mixture - mixture.detach())


class _Residual(nn.Module):
    """x + Conv1x1(GELU(Conv3x3(GELU(x)))), the identity at first, so that no norm is needed.

    Without one a picture's tokens depend on that picture alone, and a patch's on what it can see.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, 3, padding=1)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.mix(F.gelu(self.spatial(F.gelu(features))))


class _Layers(nn.Sequential):
    """Compiled as one: torch.compile leaves the loop of nn.Sequential itself to Python, and takes its layers singly."""

    def forward(self, features: Tensor) -> Tensor:
        for layer in self:
            features = layer(features)
        return features


def _initialise(module: nn.Module) -> None:
    """Convolutions keep the variance of what they are given; a residual branch begins at zero."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        # an upsampled pixel is made from one pixel only
        taps = 1 if isinstance(module, nn.ConvTranspose2d) else math.prod(module.kernel_size)
        nn.init.normal_(module.weight, std=(module.in_channels * taps) ** -0.5)
        assert module.bias is not None
        nn.init.zeros_(module.bias)
    elif isinstance(module, _Residual):  # comes after its own convolutions
        nn.init.zeros_(module.mix.weight)


def _encoder(channels: list[int], blocks: int, code_dim: int) -> _Layers:
    layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, channels[0], 3, padding=1)]
    for level, width in enumerate(channels):
        if level:
            layers.append(nn.Conv2d(channels[level - 1], width, 2, stride=2))
        layers += [_Residual(width) for _ in range(blocks)]
    return _Layers(*layers, nn.GELU(), nn.Conv2d(channels[-1], code_dim, 1))


def _decoder(channels: list[int], blocks: int, code_dim: int) -> _Layers:
    layers: list[nn.Module] = [nn.Conv2d(code_dim, channels[-1], 3, padding=1)]
    for level in reversed(range(len(channels))):
        layers += [_Residual(channels[level]) for _ in range(blocks)]
        if level:
            layers.append(nn.ConvTranspose2d(channels[level], channels[level - 1], 2, stride=2))
    return _Layers(*layers, nn.GELU(), nn.Conv2d(channels[0], 12, 3, padding=1), nn.PixelShuffle(2))


def save_visual_tokenizer(
    directory: str | Path, tokenizer: VisualTokenizer, *, weights_dtype: str = "float32", card: str = ""
) -> None:
    """Write config.json, model.safetensors (float32 or float16) and MODEL_CARD.md, each whole or not at all."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    dtype = torch.float16 if weights_dtype == "float16" else torch.float32
    stored = {name: value.detach().to("cpu", dtype).contiguous() for name, value in tokenizer.state_dict().items()}
    settings = tokenizer.config.model_dump(mode="json")
    config = {"format": FORMAT, "visual_tokenizer": settings, "weights_dtype": weights_dtype}
    write_whole(directory / "MODEL_CARD.md", (card or "# A COTS visual tokenizer\n").encode())
    write_whole(directory / "config.json", json.dumps(config, indent=2).encode() + b"\n")
    write_weights(directory / "model.safetensors", stored)


def load_visual_tokenizer(name: str) -> VisualTokenizer:
    """Load a tokenizer onto the CPU: float32, evaluation mode, no gradient.

    Args:
        name: `embedded`, or a directory that training one wrote (a run, or the tokenizer inside it).

    Raises:
        ModelError: there is none, a file is missing or damaged, or the weights are of another architecture.
    """
    directory = _directory(name)
    weights_file = directory / "model.safetensors"
    if not weights_file.is_file():
        raise ModelError(f"The visual tokenizer {directory} has no model.safetensors; copy or train it again.")
    config = _read_config(directory / "config.json")
    try:
        stored = load_file(weights_file)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{weights_file} is damaged ({error}); copy or train the visual tokenizer again.") from error
    tokenizer = VisualTokenizer(config)
    load_weights(tokenizer, {name: value.float() for name, value in stored.items()}, str(directory))
    return tokenizer.eval().requires_grad_(False)


def _directory(name: str) -> Path:
    if name == "embedded":
        if not (EMBEDDED_VISUAL_TOKENIZER / "config.json").is_file():
            raise ModelError(
                "This installation has no embedded visual tokenizer; train one with `cots pretrain "
                "configs/visual_tokenizer.yaml` and name its directory in objective.masked_modeling.visual_tokenizer."
            )
        return EMBEDDED_VISUAL_TOKENIZER
    path = Path(os.path.expanduser(name))  # that of Path raises for a user who does not exist
    for candidate in (path, path / "best"):
        if (candidate / "config.json").is_file():
            return candidate
    what = f"The directory {name} holds no visual tokenizer" if path.is_dir() else f"There is no directory {name}"
    raise ModelError(f"{what}; use `embedded`, or what `cots pretrain configs/visual_tokenizer.yaml` wrote.")


def _read_config(path: Path) -> VisualTokenizerConfig:
    try:
        saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if "model" in saved and "visual_tokenizer" not in saved:
            raise ModelError(f"{path.parent} is a model of two towers, not a visual tokenizer; name the tokenizer's.")
        version, values = int(saved["format"]), saved["visual_tokenizer"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged ({error}); copy or train the visual tokenizer again.") from error
    if version > FORMAT:
        raise ModelError(f"{path.parent} has format {version}, newer than this version reads ({FORMAT}); upgrade cots.")
    try:
        return validate_config(VisualTokenizerConfig, values, str(path))
    except ConfigError as error:
        raise ModelError(str(error)) from error
