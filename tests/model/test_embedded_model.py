"""The model that ships: its vectors are those with which the embedded gallery was built."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cots.embedded import EMBEDDED_GALLERY
from cots.model import retrieval_model
from cots.model.pretrained import load_model
from cots.model.retrieval_model import RetrievalModel

# pinned with timm 1.0.31 on a CPU; a model that is trained anew brings new ones
FINGERPRINT = "97f716cf7f8c9cf65f418219854df42b"
TRUCK = [0.0967, -0.0161, -0.0500, -0.0748, -0.0983, -0.0078]
RAMP = [-0.0230, 0.0580, 0.0855, -0.0444, -0.0084, -0.0605]


@pytest.fixture(scope="module")
def model() -> RetrievalModel:
    return load_model("embedded", device="cpu")


def test_it_is_the_model_of_the_embedded_gallery(model: RetrievalModel) -> None:
    manifest = json.loads((EMBEDDED_GALLERY / "manifest.json").read_text())
    assert model.fingerprint == manifest["fingerprint"] == FINGERPRINT


def test_its_vectors_are_those_it_was_released_with(model: RetrievalModel) -> None:
    truck = model.encode_texts(["a red truck", "two dogs run on the beach"])[0, :6]
    assert torch.allclose(truck, torch.tensor(TRUCK), atol=2e-4)
    ramp = torch.arange(256).expand(1, 3, 256, 256).to(torch.uint8)
    assert torch.allclose(model.encode_images(ramp)[0, :6], torch.tensor(RAMP), atol=2e-4)


def test_a_sentence_is_encoded_without_importing_vision_libraries() -> None:
    program = (
        "import sys; from cots.model.pretrained import load_model; load_model(device='cpu').encode_texts(['a dog']); "
        "print(sorted({'timm', 'torchvision', 'transformers', 'open_clip', 'torch._dynamo'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "[]"


def test_many_pictures_are_encoded_in_bfloat16_where_that_is_quicker(
    model: RetrievalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted((EMBEDDED_GALLERY / "media" / "photographs").glob("*.webp"))[::4]
    pixels = torch.stack([model.transform(Image.open(file).convert("RGB")) for file in files])
    expected = model.encode_images(pixels)
    monkeypatch.setattr(retrieval_model, "bfloat16_is_quicker", lambda: False)
    assert torch.equal(load_model("embedded", device="cpu", bulk=True).encode_images(pixels), expected)
    monkeypatch.setattr(retrieval_model, "bfloat16_is_quicker", lambda: True)
    assert torch.equal(load_model("embedded", device="cpu").encode_images(pixels), expected)
    bulk = load_model("embedded", device="cpu", bulk=True).encode_images(pixels)
    assert bulk.dtype == torch.float32
    assert not torch.equal(bulk, expected)
    assert float((bulk * expected).sum(dim=1).min()) > 0.999
    np.testing.assert_allclose(bulk.norm(dim=1), 1, atol=1e-6)
