from collections import OrderedDict

import pytest
import timm
import torch
from torch import Tensor

from pretrain.initial_weights import convert_efficientnet_lite

ARCHITECTURE = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(ARCHITECTURE, num_classes=0).eval()


def _foreign(network: torch.nn.Module) -> OrderedDict[str, Tensor]:
    """The weights under other names, in the order of the computation, a classifier at the end."""
    weights = OrderedDict((f"_layer{n}.value", value.clone()) for n, value in enumerate(network.state_dict().values()))
    weights["_fc.weight"], weights["_fc.bias"] = torch.zeros(1000, 1280), torch.zeros(1000)
    return weights


def test_renamed_weights_compute_the_same(network: torch.nn.Module) -> None:
    converted = convert_efficientnet_lite(_foreign(network), ARCHITECTURE)
    twin = timm.create_model(ARCHITECTURE, num_classes=0).eval()
    twin.load_state_dict(converted)
    picture = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(twin(picture), network(picture))


def test_weights_of_another_network_are_refused(network: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="not those of tf_efficientnet_lite2"):
        convert_efficientnet_lite(_foreign(network), "tf_efficientnet_lite2")
    turned = _foreign(network)
    turned["_layer0.value"] = turned["_layer0.value"].transpose(0, 1)
    with pytest.raises(ValueError, match="not those of"):
        convert_efficientnet_lite(turned, ARCHITECTURE)
