"""All levels of the objective on an open_clip model's towers, from its weights to a model that search loads."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from cots.config import ModelConfig, PretrainConfig
from cots.model.pretrained import load_model
from cots.model.visual_tokenizer import VisualTokenizer, save_visual_tokenizer
from cots.tokenizer_config import VisualTokenizerConfig
from pretrain.model_card import model_card
from pretrain.trainer import pretrain


def test_an_open_clip_model_learns_all_levels(
    make_config: Callable[..., PretrainConfig],
    open_clip_config: ModelConfig,
    open_clip_checkpoint: Path,
    tmp_path: Path,
) -> None:
    codes = VisualTokenizerConfig(codebook_size=16, width=8, min_width=8, blocks=1, image_size=32)
    save_visual_tokenizer(tmp_path / "codes", VisualTokenizer(codes))
    model = open_clip_config.model_dump()
    model["text_tower"]["max_length"] = 16
    start = f"open_clip:cots-test-tiny/{open_clip_checkpoint}"
    config = make_config(
        model=model,
        start={"model": start},
        objective={
            "masked_modeling": {
                "image_weight": 0.5, "text_weight": 0.5, "visual_tokenizer": str(tmp_path / "codes"),
            },
            "task_alignment": {"weight": 0.5},
            "noise_filter": {"queue_size": 40},
        },
        optimizer={"image_tower_rate": 1e-4, "image_layer_decay": 0.5, "text_layer_decay": 0.5},
        training={"precision": "bf16"},
    )  # fmt: skip
    run = pretrain(config)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "loss" in row]
    assert losses
    assert all(row["loss_masked_image"] > 0 and row["loss_masked_text"] > 0 for row in losses)
    found, given = load_model(str(run), device="cpu"), load_model(start, device="cpu")
    captions = ["a red ball on black", "yellow boat and white"]
    assert found.encode_texts(captions).shape == (2, 16)
    similarity = (found.encode_texts(captions) * given.encode_texts(captions)).sum(dim=1)
    assert torch.all((similarity > 0.2) & (similarity < 0.9999))  # it came from there, and moved


def test_the_card_of_an_open_clip_model_says_what_its_towers_are(open_clip_config: ModelConfig) -> None:
    card = model_card(PretrainConfig(model=open_clip_config), {})
    assert f"- Image tower: {open_clip_config.image_tower.name} at 32 px (crop)" in card
    assert f"- Text tower: {open_clip_config.text_tower.name}, at most" in card
    assert "BERT" not in card
    assert "pooled by" not in card
    assert "- Started from: image random, text random" in card
