"""The moving average of a network against the same one written out, a tensor at a time."""

import torch
from torch import nn

from pretrain.momentum import MovingAverage


def _network() -> nn.Sequential:
    """Weights, running statistics, and the number of batches seen, which is whole."""
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).train()


def _learn(network: nn.Module) -> None:
    """As a step would: new weights, new statistics."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter))
    network(torch.randn(6, 5))


def test_an_average_follows_the_network_by_its_decay() -> None:
    decay = 0.7
    network = _network()
    average = MovingAverage(network, decay)
    expected = {name: value.clone() for name, value in network.state_dict().items()}
    for _ in range(3):
        _learn(network)
        average.update()
        for name, value in network.state_dict().items():
            averaged = decay * expected[name] + (1 - decay) * value
            expected[name] = averaged if value.is_floating_point() else value.clone()
        torch.testing.assert_close(dict(average.network.state_dict()), expected)
    assert average.network.state_dict()["1.num_batches_tracked"] == 3


def test_an_average_begins_as_the_network_and_starts_anew_as_it() -> None:
    network = _network()
    average = MovingAverage(network, 0.7)
    for begin in (lambda: None, average.reset, average.reset):
        begin()
        ours, theirs = average.network.state_dict(), network.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert not {value.data_ptr() for value in ours.values()} & {value.data_ptr() for value in theirs.values()}
        _learn(network)
        assert not torch.equal(ours["0.weight"], theirs["0.weight"])


def test_an_average_neither_drops_nor_learns() -> None:
    """Whichever mode the network is in, and with a twin that becomes the average."""
    network = _network()
    twin = _network()
    for average in (MovingAverage(network, 0.7), MovingAverage(network, 0.7, twin)):
        for step in (lambda: None, average.update, average.reset):
            step()
            assert not any(module.training for module in average.network.modules())
            assert not any(parameter.requires_grad for parameter in average.network.parameters())
    assert average.network is twin
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
