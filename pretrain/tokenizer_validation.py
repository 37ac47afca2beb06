"""What a visual tokenizer keeps of pictures that it was not trained on, and the sheet that shows it."""

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from cots.config import SourceConfig
from cots.errors import TrainingError
from cots.model.visual_tokenizer import VisualTokenizer
from pretrain.tokenizer_pictures import decode_all
from pretrain.validation import open_validation_source

_AT_ONCE = 128
_SHEET_COLUMNS = 12
_SHEET_ROWS = 2
_GAP = 4


class TokenizerValidation:
    """The validation sources, decoded once and kept as uint8 pixels in memory.

    Raises:
        ConfigError: a source is named like a test split, on which no tokenizer may be chosen.
        SourceError, TrainingError: an entry of a source cannot be used, an item not be decoded.
    """

    def __init__(self, sources: Sequence[SourceConfig], image_size: int, workers: int) -> None:
        self._sets: dict[str, Tensor] = {}
        for config in sources:
            decoded = decode_all([open_validation_source(config)], image_size, workers)
            for name, reason in [*decoded.bad, *decoded.left_out]:
                raise TrainingError(f"{name}: {reason}; a validation source must be whole, or figures do not compare.")
            self._sets[config.path] = decoded.frames

    def __bool__(self) -> bool:
        return bool(self._sets)

    @torch.inference_mode()
    def measure(self, tokenizer: VisualTokenizer, device: torch.device) -> dict[str, dict[str, float]]:
        """Figures of every source, all of pictures painted from tokens alone, in float32.

        `reconstruction_error` is the mean squared error of pixel values in [0, 1], `psnr` the same in dB;
        `codebook_usage` the share of the codes that some patch has, `codebook_perplexity` the number of equally
        frequent codes that would have the entropy of the tokens.
        """
        results = {}
        for path, pixels in self._sets.items():
            squared = 0.0
            counts = torch.zeros(tokenizer.codebook_size)
            for part in pixels.split(_AT_ONCE):
                part = part.to(device)
                tokens = tokenizer.tokens(part, part.shape[-1] // tokenizer.stride)
                difference = tokenizer.reconstruct(tokens) - part.float() / 255
                squared += difference.square().sum(dtype=torch.float64).item()
                counts += tokens.flatten().bincount(minlength=len(counts)).cpu()
            results[path] = figures(squared / pixels.numel(), counts)
        return results

    @torch.inference_mode()
    def sheet(self, tokenizer: VisualTokenizer, device: torch.device) -> Image.Image:
        """Rows of validation pictures, each above the same pictures painted from their tokens."""
        per_set = max(1, _SHEET_COLUMNS * _SHEET_ROWS // len(self._sets))
        chosen = [pixels[:: max(1, len(pixels) // per_set)][:per_set] for pixels in self._sets.values()]
        pixels = torch.cat(chosen).to(device)
        painted = tokenizer.reconstruct(tokenizer.tokens(pixels, pixels.shape[-1] // tokenizer.stride))
        return reconstruction_sheet(pixels.cpu(), (painted * 255).round().to(torch.uint8).cpu())


def figures(mean_squared_error: float, counts: Tensor) -> dict[str, float]:
    """The figures of a source from its error and from how often each code occurs, (K,)."""
    share = counts.double() / counts.sum()
    return {
        "reconstruction_error": mean_squared_error,
        "psnr": -10 * math.log10(mean_squared_error) if mean_squared_error else math.inf,
        "codebook_usage": float((counts > 0).double().mean()),
        "codebook_perplexity": math.exp(-float(torch.special.xlogy(share, share).sum())),
    }


def reconstruction_sheet(pixels: Tensor, painted: Tensor) -> Image.Image:
    """Two (B, 3, S, S) uint8 as one picture: a row of inputs, below it their reconstructions, and so on."""
    count, side = len(pixels), pixels.shape[-1]
    columns = min(_SHEET_COLUMNS, count)
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (side + _GAP) - _GAP, rows * 2 * (side + _GAP) - _GAP), "white")
    for place in range(count):
        x, y = place % columns * (side + _GAP), place // columns * 2 * (side + _GAP)
        for below, picture in enumerate((pixels[place], painted[place])):
            sheet.paste(Image.fromarray(picture.permute(1, 2, 0).numpy()), (x, y + below * (side + _GAP)))
    return sheet
