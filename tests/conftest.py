"""Shared fixtures: a tiny model with random weights and its directory. Tests never touch the network."""

import json
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from cots.config import ModelConfig
from cots.model.caption_tokenizer import WordPieceTokenizer
from cots.model.dual_encoder import DualEncoder
from cots.model.model_directory import save_model
from cots.model.pretrained import load_model
from cots.model.retrieval_model import RetrievalModel

# An example that a busy machine holds up for 200 ms is no failure.
settings.register_profile("any machine", settings(deadline=None))
settings.load_profile("any machine")

# As in a terminal: what a shell starts in the background, and all that it starts, would ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_VOCABULARY = """
a an the of in on with and is are at to man woman child dog cat bird boat car truck red blue green yellow black
white square circle runs sits jumps stands water grass snow beach street ball left right picture photo drawing two
three people
"""
WORDS = _VOCABULARY.split()


@pytest.fixture(scope="session")
def vocabulary_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WordPiece vocabulary of a few words, the letters, and their continuations."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *WORDS[1:]]
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(dict.fromkeys(pieces)) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_model_config() -> ModelConfig:
    """A ViT of two blocks at 64 px and a BERT of two layers: a few thousand parameters, D = 32."""
    return ModelConfig.model_validate(
        {
            "embedding_dim": 32,
            "image_tower": {
                "name": "vit_tiny_patch16_224",
                "image_size": 64,
                "architecture": {"embed_dim": 32, "depth": 2, "num_heads": 2},
            },
            "text_tower": {
                "vocabulary": 128,
                "width": 32,
                "layers": 2,
                "heads": 2,
                "intermediate": 64,
                "positions": 32,
                "max_length": 16,
                "dropout": 0.0,
            },
        }
    )


@pytest.fixture(scope="session")
def tiny_model_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_config: ModelConfig, vocabulary_file: Path
) -> Path:
    """A saved model with random weights."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("tiny_model")
    tokenizer = WordPieceTokenizer.from_file(vocabulary_file, tiny_model_config.text_tower.max_length)
    save_model(directory, DualEncoder(tiny_model_config), tokenizer)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tiny_model_dir: Path) -> RetrievalModel:
    return load_model(str(tiny_model_dir), device="cpu")


@pytest.fixture(scope="session")
def open_clip_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registered open_clip architecture of a few thousand parameters and its saved weights."""
    open_clip = pytest.importorskip("open_clip")
    directory = tmp_path_factory.mktemp("open_clip")
    architecture = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (directory / "cots-test-tiny.json").write_text(json.dumps(architecture))
    open_clip.add_model_config(directory / "cots-test-tiny.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("cots-test-tiny").state_dict(), directory / "weights.pt")
    return directory / "weights.pt"


@pytest.fixture(scope="session")
def open_clip_config(open_clip_checkpoint: Path) -> ModelConfig:
    """The settings of a dual encoder with this architecture's towers."""
    open_clip = pytest.importorskip("open_clip")
    name = "open_clip:cots-test-tiny"
    mean, std = open_clip.constants.OPENAI_DATASET_MEAN, open_clip.constants.OPENAI_DATASET_STD
    return ModelConfig.model_validate(
        {
            "embedding_dim": 16,
            "image_tower": {"name": name, "image_size": 32, "resize": "crop", "mean": mean, "std": std},
            "text_tower": {"name": name, "vocabulary": 49408, "max_length": 77, "positions": 77},
        }
    )
