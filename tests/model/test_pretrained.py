import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cots.config import ModelConfig
from cots.embedded import EMBEDDED_VISUAL_TOKENIZER
from cots.errors import ConfigError, ModelError
from cots.model import open_clip_model
from cots.model.caption_tokenizer import WordPieceTokenizer
from cots.model.dual_encoder import DualEncoder
from cots.model.model_directory import read_model, save_model
from cots.model.pretrained import load_model
from cots.model.retrieval_model import RetrievalModel


def test_embeddings_are_unit_vectors_of_the_models_dimension(tiny_model: RetrievalModel) -> None:
    images = tiny_model.encode_images(torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8))
    texts = tiny_model.encode_texts(["a red car", "two dogs on the beach"])
    assert images.shape == (3, tiny_model.dimension)
    assert texts.shape == (2, tiny_model.dimension)
    assert torch.allclose(images.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(texts.norm(dim=1), torch.ones(2), atol=1e-5)
    assert tiny_model.encode_texts([]).shape == (0, tiny_model.dimension)


def test_a_text_embeds_the_same_alone_and_in_a_batch_with_a_longer_one(tiny_model: RetrievalModel) -> None:
    alone = tiny_model.encode_texts(["a red car"])
    together = tiny_model.encode_texts(["a red car", "two people stand in the water with a dog and a white ball"])
    assert torch.allclose(alone[0], together[0], atol=1e-5)


def test_a_tokenizer_that_frames_no_caption_is_refused(vocabulary_file: Path, tmp_path: Path) -> None:
    """The tower would pool the first word for [CLS], and find none in an empty caption."""
    bare = json.loads(WordPieceTokenizer.from_file(vocabulary_file, 16).to_json())
    bare["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(bare))
    with pytest.raises(ConfigError, match=r"tokenizer\.json puts no \[CLS\] before a caption; .* post-processor"):
        WordPieceTokenizer.from_file(tmp_path / "tokenizer.json", 16)


@pytest.mark.parametrize("name", ["tiny", "open_clip"])
def test_what_is_no_character_is_a_question_mark(name: str, tiny_model_dir: Path, open_clip_checkpoint: Path) -> None:
    """As of a command line whose bytes are not UTF-8."""
    model = load_model(
        str(tiny_model_dir) if name == "tiny" else f"open_clip:cots-test-tiny/{open_clip_checkpoint}", device="cpu"
    )
    assert torch.equal(model.encode_texts(["a caf\udce9 \ud83d"]), model.encode_texts(["a caf? ?"]))


def test_others_may_read_a_saved_model_as_any_new_file(tiny_model_dir: Path, tmp_path: Path) -> None:
    encoder, tokenizer, _ = read_model(tiny_model_dir)
    save_model(tmp_path / "saved", encoder, tokenizer)
    (tmp_path / "new").touch()
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "saved").iterdir()}
    assert set(modes.values()) == {(tmp_path / "new").stat().st_mode}, modes


def test_a_saved_model_embeds_as_before_and_keeps_its_fingerprint(tiny_model_dir: Path, tmp_path: Path) -> None:
    encoder, tokenizer, fingerprint = read_model(tiny_model_dir)
    assert save_model(tmp_path / "again", encoder, tokenizer) == fingerprint
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    first, second = load_model(str(tiny_model_dir)), load_model(str(tmp_path / "again"))
    assert first.fingerprint == second.fingerprint == fingerprint
    assert torch.equal(first.encode_images(pixels), second.encode_images(pixels))


def test_the_fingerprint_changes_with_weights_transform_and_tokenizer(
    tiny_model_config: ModelConfig, vocabulary_file: Path, tmp_path: Path
) -> None:
    def fingerprint(config: ModelConfig, name: str, vocabulary: Path = vocabulary_file, shift: float = 0.0) -> str:
        torch.manual_seed(1)
        model = DualEncoder(config)
        with torch.no_grad():
            model.image_projection.linear.bias[0] += shift
        return save_model(tmp_path / name, model, WordPieceTokenizer.from_file(vocabulary, 16))

    cropped = tiny_model_config.model_copy(
        update={"image_tower": tiny_model_config.image_tower.model_copy(update={"resize": "crop"})}
    )
    other_words = tmp_path / "vocab.txt"
    other_words.write_text(vocabulary_file.read_text().replace("beach", "peach"))
    base = fingerprint(tiny_model_config, "base")
    assert fingerprint(tiny_model_config, "same") == base
    assert len({base, *(
        fingerprint(tiny_model_config, "weights", shift=1e-3),
        fingerprint(cropped, "transform"),
        fingerprint(tiny_model_config, "tokenizer", vocabulary=other_words),
    )}) == 4  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-5), ("int8", 2e-3)])
def test_compact_storage_hardly_moves_the_embeddings(
    tiny_model_dir: Path, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    encoder, tokenizer, _ = read_model(tiny_model_dir)
    save_model(tmp_path, encoder, tokenizer, weights_dtype=dtype)
    assert (tmp_path / "model.safetensors").stat().st_size < (tiny_model_dir / "model.safetensors").stat().st_size
    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    full, compact = (
        load_model(str(tiny_model_dir)).encode_images(pixels),
        load_model(str(tmp_path)).encode_images(pixels),
    )
    assert (1 - (full * compact).sum(dim=1)).max() < tolerance


def _copy(directory: Path, target: Path) -> Path:
    return Path(shutil.copytree(directory, target))


def test_damaged_and_foreign_directories_are_refused_with_a_sentence(tiny_model_dir: Path, tmp_path: Path) -> None:
    missing = _copy(tiny_model_dir, tmp_path / "missing")
    (missing / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        load_model(str(missing))

    truncated = _copy(tiny_model_dir, tmp_path / "truncated")
    weights = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match="is damaged"):
        load_model(str(truncated))

    foreign = _copy(tiny_model_dir, tmp_path / "foreign")
    config = json.loads((foreign / "config.json").read_text())
    config["model"]["embedding_dim"] = 48
    (foreign / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="another architecture"):
        load_model(str(foreign))

    with pytest.raises(ModelError, match="is a visual tokenizer, not a model of two towers; name the model's"):
        load_model(str(EMBEDDED_VISUAL_TOKENIZER))

    newer = _copy(tiny_model_dir, tmp_path / "newer")
    for version, message in ((99, "newer than this version"), ("new", r"config\.json is damaged"), (None, "damaged")):
        config["format"] = version
        (newer / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=message):
            load_model(str(newer))


def test_a_quantised_matrix_without_its_scale_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    encoder, tokenizer, _ = read_model(tiny_model_dir)
    save_model(tmp_path, encoder, tokenizer, weights_dtype="int8")
    weights = load_file(tmp_path / "model.safetensors")
    scale = next(name for name in weights if name.startswith("text_") and name.endswith(".scale"))
    del weights[scale]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=f"{tmp_path} has no weights for {scale}"):
        load_model(str(tmp_path))


def test_a_tokenizer_of_more_words_than_the_text_tower_has_is_refused(
    tiny_model_dir: Path, vocabulary_file: Path, tmp_path: Path
) -> None:
    mixed = _copy(tiny_model_dir, tmp_path / "mixed")
    words = tmp_path / "vocab.txt"
    words.write_text(vocabulary_file.read_text() + "".join(f"word{number}\n" for number in range(100)))
    (mixed / "tokenizer.json").write_text(WordPieceTokenizer.from_file(words, 16).to_json())
    with pytest.raises(ModelError, match=r"tokenizer\.json has \d+ word pieces, the text tower 128; copy or train"):
        load_model(str(mixed))


def test_unknown_names_say_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no model 'nonesuch'"):
        load_model("nonesuch")
    with pytest.raises(ModelError, match="holds no model"):
        load_model(str(tmp_path))
    with pytest.raises(ModelError, match="no open_clip model"):
        load_model("open_clip:Nonesuch/tag")
    with pytest.raises(ModelError, match="open_clip has no weights 'nonesuch'"):
        load_model("open_clip:ViT-B-32/nonesuch")
    with pytest.raises(ModelError, match="There is no model '~nonesuch/model'"):
        load_model("~nonesuch/model")
    empty = tmp_path / "empty.pt"
    empty.touch()
    with pytest.raises(ModelError, match=r"weights of open_clip:ViT-B-32/.*empty\.pt could not be loaded: EOFError"):
        load_model(f"open_clip:ViT-B-32/{empty}")


def test_an_open_clip_model_whose_tokenizer_cannot_be_had_is_refused_with_a_sentence(
    open_clip_checkpoint: Path, tmp_path: Path
) -> None:
    architecture = open_clip.get_model_config("cots-test-tiny")
    architecture["text_cfg"]["hf_tokenizer_name"] = "nonesuch/nonesuch"  # there is no network
    (tmp_path / "cots-test-foreign.json").write_text(json.dumps(architecture))
    open_clip.add_model_config(tmp_path / "cots-test-foreign.json")
    with pytest.raises(ModelError, match=r"The tokenizer of open_clip:cots-test-foreign/.* could not be loaded: \w+"):
        load_model(f"open_clip:cots-test-foreign/{open_clip_checkpoint}", device="cpu")


def test_several_texts_of_a_coca_embed_as_open_clip_does(open_clip_checkpoint: Path, tmp_path: Path) -> None:
    """Its attention has a mask of its own for every text and head."""
    architecture = open_clip.get_model_config("cots-test-tiny")
    architecture["text_cfg"]["embed_cls"] = True
    (tmp_path / "cots-test-coca.json").write_text(json.dumps({**architecture, "custom_text": True}))
    open_clip.add_model_config(tmp_path / "cots-test-coca.json")
    torch.manual_seed(0)
    reference = open_clip.create_model("cots-test-coca").eval()
    torch.save(reference.state_dict(), tmp_path / "weights.pt")
    texts = ["a red car", "two dogs run on the beach", "snow"]
    with torch.inference_mode():
        theirs = reference.encode_text(open_clip.get_tokenizer("cots-test-coca")(texts), normalize=True)
    model = load_model(f"open_clip:cots-test-coca/{tmp_path / 'weights.pt'}", device="cpu")
    assert torch.allclose(model.encode_texts(texts), theirs, atol=1e-5)


def test_an_open_clip_model_embeds_as_open_clip_does(
    open_clip_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(f"open_clip:cots-test-tiny/{open_clip_checkpoint}", device="cpu")
    reference, _, preprocess = open_clip.create_model_and_transforms(
        "cots-test-tiny", pretrained=str(open_clip_checkpoint)
    )
    reference.eval()
    generator = torch.Generator().manual_seed(3)
    noise = torch.randint(0, 256, (80, 120, 3), generator=generator, dtype=torch.uint8).numpy()
    for image in (
        Image.fromarray(noise).resize((321, 200)),
        Image.fromarray(noise),
        Image.fromarray(noise).resize((45, 333)),
    ):
        ours = model.encode_images(model.transform(image)[None])
        with torch.inference_mode():
            theirs = reference.encode_image(preprocess(image)[None], normalize=True)
        assert torch.allclose(ours, theirs, atol=1e-5)
    texts = ["a red car", "two dogs"]
    with torch.inference_mode():
        theirs = reference.encode_text(open_clip.get_tokenizer("cots-test-tiny")(texts), normalize=True)
    assert torch.allclose(model.encode_texts(texts), theirs, atol=1e-5)
    assert model.fingerprint == load_model(model.name, device="cpu").fingerprint
    monkeypatch.setattr(open_clip_model, "bfloat16_is_quicker", lambda: True)
    bulk = load_model(model.name, device="cpu", bulk=True).encode_images(model.transform(image)[None])
    assert 0.999 < float((bulk * ours).sum()) < 1 - 1e-7
