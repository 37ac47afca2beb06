from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from transformers import BertConfig, BertForMaskedLM

from cots.config import ModelConfig, PretrainConfig
from cots.errors import ConfigError, ModelError
from cots.model.caption_tokenizer import WordPieceTokenizer
from cots.model.clip_tokenizer import ClipTokenizer
from cots.model.dual_encoder import DualEncoder
from cots.model.model_directory import save_model
from pretrain.start import starting_encoder, starting_tokenizer

MakeConfig = Callable[..., PretrainConfig]


def _start(config: PretrainConfig) -> DualEncoder:
    return starting_encoder(config, starting_tokenizer(config))


def _changed(config: PretrainConfig, tower: str, **settings: object) -> dict:
    """The model section with some settings of a tower changed."""
    model = config.model.model_dump()
    model[tower].update(settings)
    return model


@pytest.fixture
def bert_directory(tmp_path: Path) -> Path:
    """A BERT of the tiny model's shape as Hugging Face saves it: in fp16, with a prefix and a head."""
    shape = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertForMaskedLM(BertConfig(**shape, intermediate_size=64, max_position_embeddings=32))
    bert.half().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def trunk_file(tmp_path: Path) -> Path:
    """A timm ViT of the tiny model's shape at 64 px, with a classifier."""
    trunk = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=2, num_heads=2, num_classes=10)
    save_file(trunk.state_dict(), tmp_path / "trunk.safetensors")
    return tmp_path / "trunk.safetensors"


def test_nothing_named_is_random(make_config: MakeConfig) -> None:
    torch.manual_seed(1)
    first = _start(make_config())
    assert not torch.equal(first.image_projection.linear.weight, _start(make_config()).image_projection.linear.weight)


def test_a_bert_directory_fills_the_text_tower(make_config: MakeConfig, bert_directory: Path) -> None:
    encoder = _start(make_config(start={"text_tower": str(bert_directory)}))
    stored = load_file(bert_directory / "model.safetensors")
    for name, value in encoder.text_tower.bert.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, stored[f"bert.{name}"].float()), name


def test_the_names_of_the_oldest_berts_are_known(make_config: MakeConfig, bert_directory: Path) -> None:
    path = bert_directory / "model.safetensors"

    def old_name(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    old = {old_name(name): value for name, value in load_file(path).items()}
    save_file(old, path)
    encoder = _start(make_config(start={"text_tower": str(bert_directory)}))
    for name, value in encoder.text_tower.bert.state_dict().items():
        assert torch.equal(value, old[old_name(f"bert.{name}")].float()), name


def test_a_bert_of_another_shape_is_refused_with_what_to_set(make_config: MakeConfig, bert_directory: Path) -> None:
    start = {"text_tower": str(bert_directory)}
    for positions in (16, 64):
        config = make_config()
        with pytest.raises(ModelError, match=rf"32 positions, the text tower {positions}; set .*positions=32"):
            _start(make_config(start=start, model=_changed(config, "text_tower", positions=positions)))
    narrow = _changed(make_config(), "text_tower", intermediate=48)
    with pytest.raises(ModelError, match=r"encoder\.layer\.0\.intermediate\.dense\.bias is \(64,\), .* needs \(48,\)"):
        _start(make_config(start=start, model=narrow))
    with pytest.raises(ModelError, match="cannot be read"):
        _start(make_config(start={"text_tower": str(bert_directory / "nonesuch")}))


def test_a_timm_file_fills_the_image_tower_at_any_size(make_config: MakeConfig, trunk_file: Path) -> None:
    start = {"image_tower": str(trunk_file)}
    stored = load_file(trunk_file)
    same = _start(make_config(start=start)).image_tower.trunk.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in same.items())
    larger = _start(make_config(start=start, model=_changed(make_config(), "image_tower", image_size=96)))
    found = larger.image_tower.trunk.state_dict()
    assert torch.equal(found["pos_embed"], resample_abs_pos_embed(stored["pos_embed"], [6, 6]))
    assert torch.equal(found["blocks.1.mlp.fc1.weight"], stored["blocks.1.mlp.fc1.weight"])


def test_an_image_tower_of_another_architecture_names_the_first_difference(
    make_config: MakeConfig, trunk_file: Path
) -> None:
    model = _changed(make_config(), "image_tower", architecture={"embed_dim": 48, "depth": 2, "num_heads": 2})
    with pytest.raises(ModelError, match=r"blocks\.0\.attn\.proj\.bias is \(32,\), the model needs \(48,\)"):
        _start(make_config(start={"image_tower": str(trunk_file)}, model=model))
    # no network here
    model = _changed(make_config(), "image_tower", name="test_vit", image_size=160, architecture={})
    with pytest.raises(ModelError, match=r"timm's weights of test_vit could not be loaded"):
        _start(make_config(start={"image_tower": "timm"}, model=model))


def test_a_model_starts_another_at_a_larger_size_and_leaves_its_centres(
    make_config: MakeConfig, tiny_model_config: ModelConfig, vocabulary_file: Path, tmp_path: Path
) -> None:
    given = DualEncoder(tiny_model_config)
    given.image_center.fill_(0.1)
    save_model(tmp_path / "given", given, WordPieceTokenizer.from_file(vocabulary_file, 16))
    model = _changed(make_config(), "image_tower", image_size=128)
    model["text_tower"]["tokenizer"] = ""
    config = make_config(start={"model": str(tmp_path / "given")}, model=model)
    assert starting_tokenizer(config)(["a red car"]).shape == (1, 5)
    found, wanted = _start(config).state_dict(), given.state_dict()
    for name, value in wanted.items():
        if name == "image_tower.trunk.pos_embed":
            assert torch.equal(found[name], resample_abs_pos_embed(value, [8, 8]))
        elif name != "image_center":
            assert torch.equal(found[name], value), name
    assert not found["image_center"].any()
    deeper = _changed(make_config(), "text_tower", layers=3)
    with pytest.raises(ModelError, match=r"no weights for text_tower\.bert\.encoder\.layer\.2\.attention"):
        _start(make_config(start={"model": str(tmp_path / "given")}, model=deeper))


def test_an_open_clip_model_starts_both_towers(
    make_config: MakeConfig, open_clip_config: ModelConfig, open_clip_checkpoint: Path
) -> None:
    name = f"open_clip:cots-test-tiny/{open_clip_checkpoint}"
    model = open_clip_config.model_dump()
    config = make_config(start={"model": name}, model=model)
    assert isinstance(starting_tokenizer(config), ClipTokenizer)
    stored = torch.load(open_clip_checkpoint)
    found = _start(config).state_dict()
    assert torch.equal(found["image_tower.trunk.class_embedding"], stored["visual.class_embedding"])
    assert torch.equal(found["text_projection.linear.weight"], stored["text_projection"].T)
    model["image_tower"]["image_size"] = 64
    larger = _start(make_config(start={"model": name}, model=model))
    assert larger.encode_image(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).tokens.shape == (1, 64, 32)
    model["image_tower"]["mean"] = (0.5, 0.5, 0.5)
    with pytest.raises(ConfigError, match=r"needs model\.image_tower\.mean=\[0\.48"):
        _start(make_config(start={"model": name}, model=model))
    with pytest.raises(ConfigError, match=r"needs model\.image_tower\.name=open_clip:cots-test-tiny, not vit_tiny"):
        _start(make_config(start={"model": name}))


def test_too_many_word_pieces_are_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"word pieces, the text tower 64; set model\.text_tower\.vocabulary"):
        _start(make_config(model=_changed(make_config(), "text_tower", vocabulary=64)))


def test_word_pieces_that_the_start_has_not_learnt_are_refused(
    make_config: MakeConfig, tiny_model_dir: Path, vocabulary_file: Path, tmp_path: Path
) -> None:
    _start(make_config(start={"model": str(tiny_model_dir)}))  # the same ones, named once more
    turned = tmp_path / "turned.txt"
    words = vocabulary_file.read_text().splitlines()
    turned.write_text("\n".join([*words[:5], *reversed(words[5:])]) + "\n")
    config = make_config()
    model = _changed(config, "text_tower", tokenizer=str(turned))
    with pytest.raises(ConfigError, match=r"turned\.txt has other word pieces than .*tiny_model.*leave model"):
        _start(make_config(model=model, start={"model": str(tiny_model_dir)}))


def test_a_training_needs_a_tokenizer(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"model\.text_tower\.tokenizer is not set"):
        _start(make_config(model=_changed(make_config(), "text_tower", tokenizer="")))


def test_a_tower_that_cannot_be_built_at_a_size_says_so(make_config: MakeConfig) -> None:
    model = make_config().model.model_dump()
    model["image_tower"] = {"name": "swin_tiny_patch4_window7_224", "image_size": 64, "pooling": "mean"}
    with pytest.raises(ConfigError, match="swin_tiny_patch4_window7_224 does not take pictures of 64 px"):
        _start(make_config(model=model))


def test_what_has_to_be_fetched_first_is_said_with_the_command(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_config().model.model_dump()
    command = r"`python -m pretrain\.initial_weights` fetches it\.$"
    start = {"image_tower": "runs/initial/tower.safetensors"}
    config = make_config(start=start)
    with pytest.raises(ModelError, match=rf"tower\.safetensors cannot be read: .*{command}"):
        starting_encoder(config, starting_tokenizer(config))
    model["text_tower"]["tokenizer"] = "runs/initial/minilm/vocab.txt"
    with pytest.raises(ConfigError, match=rf"vocab\.txt does not exist; {command}"):
        starting_tokenizer(make_config(model=model))
