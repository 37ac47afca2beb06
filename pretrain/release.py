"""Turn a training output into a model that ships: compact weights, centred embeddings, and a measured card.

python -m pretrain.release runs/cots_mini --out cots/assets/model
    --validation data/flickr8k/val-000000.tar --notes docs/embedded_model.md
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cots.config import read_config
from cots.evaluation.evaluate import evaluate
from cots.model.model_directory import read_model, save_model
from cots.model.pretrained import load_model, model_directory
from cots.model.retrieval_model import RetrievalModel
from pretrain.command import exit_code
from pretrain.model_card import model_card
from pretrain.pair_sources import PairSource, open_source


def release(run: Path, out: Path, validation: Sequence[str], notes: str = "", centering: float = 1.0) -> str:
    """Write `out` from a run's best model and measure it on validation sources; returns the fingerprint.

    The config.yaml of the run says what it was trained on; `notes` is put at the end of the card. Embeddings are
    shifted by `centering` times the training pairs' means (see DualEncoder).

    Raises:
        CotsError: `run` holds no training of a model, or a source cannot be read.
    """
    config = read_config(run / "config.yaml")
    encoder, tokenizer, _ = read_model(model_directory(str(run)))
    save_model(out, encoder, tokenizer, weights_dtype="int8")
    images, texts = centers(load_model(str(out)), [open_source(source) for source in config.data.train])
    encoder.image_center.copy_(centering * images)
    encoder.text_center.copy_(centering * texts)
    save_model(out, encoder, tokenizer, weights_dtype="int8")
    model = load_model(str(out))
    results = {source: evaluate(source, model).directions for source in validation}
    card = model_card(config.model_copy(update={"model": encoder.config}), results, notes)
    return save_model(out, encoder, tokenizer, weights_dtype="int8", card=card)


def centers(model: RetrievalModel, sources: Sequence[PairSource], every: int = 10) -> tuple[Tensor, Tensor]:
    """The mean embedding of the images and of the texts of every tenth training pair: two (D,) vectors, of norm < 1."""
    pairs = [source.read(index) for source in sources for index in range(0, len(source), every)]
    images, texts = [], []
    for start in range(0, len(pairs), 16):
        part = pairs[start : start + 16]
        images.append(model.encode_images(torch.stack([model.transform(pair.frames(4)[0]) for pair in part])))
        texts.append(model.encode_texts([pair.captions[0] for pair in part]))
    return torch.cat(images).mean(dim=0), torch.cat(texts).mean(dim=0)


def main() -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--validation", nargs="+", required=True, help="captioned sources, none used for training")
    parser.add_argument("--notes", type=Path)
    parser.add_argument("--centering", type=float, default=1.0, help="share of the means that is subtracted")
    arguments = parser.parse_args()
    notes = arguments.notes.read_text(encoding="utf-8") if arguments.notes else ""
    fingerprint = release(arguments.run, arguments.out, arguments.validation, notes, arguments.centering)
    print(f"{arguments.out} holds the model {fingerprint}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
