import torch
from torch import nn

from cots.model.folding import fold_batch_norms
from cots.model.image_tower import ImageTower
from cots.model_config import ImageTowerConfig


def _tower() -> ImageTower:
    tower = ImageTower(ImageTowerConfig(name="tf_efficientnet_lite0", image_size=64, pooling="mean")).eval()
    for module in tower.modules():
        if isinstance(module, nn.BatchNorm2d):  # as if trained
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return tower


def test_a_folded_tower_computes_the_same_without_batch_norms() -> None:
    tower = _tower()
    folded = fold_batch_norms(tower, torch.randn(1, 3, 64, 64))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in tower.modules())
    pixels = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        expected, found = tower(pixels).pooled, folded(pixels).pooled
    assert (expected - found).norm() < 1e-4 * expected.norm()


def test_a_network_that_computes_in_another_order_is_left_as_it_is() -> None:
    class Crossed(nn.Module):
        """Defines conv, norm side by side, and computes norm first."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.norm = nn.BatchNorm2d(3)
            nn.init.normal_(self.norm.running_mean)

        def forward_features(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.conv(self.norm(pixels))

    tower = ImageTower(ImageTowerConfig(image_size=32, pooling="mean"), trunk=Crossed()).eval()
    assert fold_batch_norms(tower, torch.randn(1, 3, 32, 32)) is tower
