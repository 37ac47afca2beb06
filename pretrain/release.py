"""Turn a training output into a model that ships: compact weights, centred embeddings, and a measured card.

python -m pretrain.release runs/cots_mini --out cots/assets/model
    --validation data/flickr8k/val-000000.tar --notes docs/embedded_model.md
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from cots.config import read_config
from cots.errors import ConfigError
from cots.evaluation.evaluate import measure
from cots.evaluation.evaluation_set import read_evaluation_set
from cots.model.model_directory import read_model, save_model
from cots.model.pretrained import load_model, model_directory
from cots.model.retrieval_model import RetrievalModel
from pretrain.command import exit_code
from pretrain.model_card import model_card
from pretrain.pair_sources import PairSource, open_source
from pretrain.soup import holds_run, read_record

_MODEL_FILES = {"config.json", "model.safetensors", "tokenizer.json", "MODEL_CARD.md"}


def release(run: Path, out: Path, validation: Sequence[str], notes: str = "", centering: float = 1.0) -> str:
    """Write `out` from a run's best model and measure it on validation sources; returns the fingerprint.

    The run's config.yaml, and the record of a soup, say what it was trained on; `notes` is put at the end of the card.
    Embeddings are shifted by `centering` times the training pairs' means (see DualEncoder). A model that lies in
    `out` is replaced at the very end, once everything went well.

    Raises:
        CotsError: `run` holds no training of a model, `out` holds something else than a released model, `centering`
            is not in [0, 1], or a source cannot be read.
    """
    if not 0 <= centering <= 1:
        raise ConfigError(f"--centering {centering:g} is no share of the means; give one between 0 and 1.")
    _refuse_other_content(out)
    encoder, tokenizer, _ = read_model(model_directory(str(run)))
    config, record = read_config(run / "config.yaml"), read_record(run)
    trained_on = record.sources if record else config.data.train
    test_sets = {source: read_evaluation_set(source) for source in validation}
    sources = [open_source(source) for source in {source.path: source for source in trained_on}.values()]
    with _replaced_at_the_end(out) as scratch:
        save_model(scratch, encoder, tokenizer, weights_dtype="int8")
        images, texts = centers(load_model(str(scratch)), sources)
        encoder.image_center.copy_(centering * images)
        encoder.text_center.copy_(centering * texts)
        save_model(scratch, encoder, tokenizer, weights_dtype="int8")
        model = load_model(str(scratch))
        results = {source: measure(test_set, model).directions for source, test_set in test_sets.items()}
        data = config.data.model_copy(update={"train": trained_on})
        card = model_card(
            config.model_copy(update={"model": encoder.config, "data": data}),
            results,
            notes,
            averaged=tuple(record.trainings) if record else (),
            centering=centering,
        )
        return save_model(scratch, encoder, tokenizer, weights_dtype="int8", card=card)


def _refuse_other_content(out: Path) -> None:
    """Raise ConfigError unless `out` is new, empty or a model by itself, which may be replaced."""
    place = out.resolve()
    if holds_run(out) or (place.name == "best" and (place.parent / "config.yaml").exists()):
        raise ConfigError(f"{out} holds a run, or a run's own model; choose another --out.")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; choose another --out.")
    found = {path.name for path in out.iterdir()} if out.exists() else set()
    if others := sorted(found - _MODEL_FILES):
        raise ConfigError(f"{out} holds {others[0]}, which is no part of a model; choose another --out.")


@contextmanager
def _replaced_at_the_end(out: Path) -> Iterator[Path]:
    """A scratch directory beside `out` that takes its place when the block ends, and is removed if it fails."""
    out = out.resolve()  # a link stays, what it points to is replaced
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}; choose another --out.") from error
    with beside as name:
        new, old = Path(name) / "new", Path(name) / "old"
        new.mkdir()
        yield new
        try:
            if out.exists():
                out.rename(old)
            new.rename(out)
        except BaseException:
            if old.exists() and not out.exists():
                old.rename(out)
            raise


def centers(model: RetrievalModel, sources: Sequence[PairSource], every: int = 10) -> tuple[Tensor, Tensor]:
    """The mean embedding of the images and of the texts of every tenth training pair: two (D,) vectors, of norm < 1."""
    pairs = [source.read(index) for source in sources for index in range(0, len(source), every)]
    images, texts = [], []
    for start in range(0, len(pairs), 16):
        part = pairs[start : start + 16]
        images.append(model.encode_images(torch.stack([model.transform(pair.frames(4)[0]) for pair in part])))
        texts.append(model.encode_texts([pair.captions[0] for pair in part]))
    return torch.cat(images).mean(dim=0), torch.cat(texts).mean(dim=0)


def _read_notes(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The notes {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The notes {path} are not a UTF-8 text file; give a Markdown file.") from error


def main() -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--validation", nargs="+", required=True, help="captioned sources, none used for training")
    parser.add_argument("--notes", type=Path)
    parser.add_argument("--centering", type=float, default=1.0, help="share of the means that is subtracted, 0 to 1")
    arguments = parser.parse_args()
    notes = _read_notes(arguments.notes) if arguments.notes else ""
    fingerprint = release(arguments.run, arguments.out, arguments.validation, notes, arguments.centering)
    print(f"{arguments.out} holds the model {fingerprint}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
