"""Several networks side by side: each for itself in training, their mean probability in evaluation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedlabel.learning.client import frozen_model
from fedlabel.models import ModelConfig, build_model
from fedlabel.models.twins import Twins


def net(seed: int = 0, norm: str = "group") -> nn.Module:
    return build_model(ModelConfig(name="resnet8", norm=norm), (1, 8, 8), 4, seed)


def images(n: int = 5) -> torch.Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def constant(*probabilities: float) -> nn.Module:
    """A network that always predicts these."""
    model = nn.Linear(1, len(probabilities))
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor(probabilities).log() + 7)
    return model


def test_worked_number() -> None:
    """(.9, .1) and (.2, .8): the mean is (.55, .45). (The mean of the logits would give (.6, .4).)"""
    twins = Twins([constant(0.9, 0.1), constant(0.2, 0.8)]).eval()
    output = twins(torch.ones(1, 1))
    assert output.exp()[0].tolist() == pytest.approx([0.55, 0.45])
    assert output.softmax(-1)[0].tolist() == pytest.approx([0.55, 0.45])
    assert twins.train()(torch.ones(1, 1)).softmax(-1)[0].flatten().tolist() == pytest.approx([0.9, 0.1, 0.2, 0.8])


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_each_network_is_itself_in_training(norm: str) -> None:
    first, second = net(1, norm), net(2, norm)
    twins = Twins([copy.deepcopy(first), copy.deepcopy(second)])
    output = twins(images())
    assert output.shape == (5, 2, 4)
    assert torch.equal(output[:, 0], first(images()))
    assert torch.equal(output[:, 1], second(images()))
    assert not torch.equal(output[:, 0], output[:, 1])
    expected = (first.eval()(images()).softmax(-1) + second.eval()(images()).softmax(-1)) / 2
    torch.testing.assert_close(twins.eval()(images()).exp(), expected)
    if norm == "group":  # BatchNorm accepts no empty batch
        assert twins(images(0)).shape == (0, 4)
        assert twins.train()(images(0)).shape == (0, 2, 4)


def test_gradients_do_not_mix() -> None:
    twins = Twins([net(1), net(2)])
    twins(images())[:, 1].square().sum().backward()
    for name, parameter in twins.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == name.startswith("networks.1."), name


def test_a_frozen_model_of_a_state_is_the_mean() -> None:
    twins = Twins([net(1), net(2)])
    state = twins.state_dict()
    assert len(state) == 2 * len(net().state_dict())
    logits = frozen_model(Twins([net(3), net(4)]), state)(images())
    assert not logits.requires_grad
    torch.testing.assert_close(logits, twins.eval()(images()))


def test_one_network_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"`models` \(1 of them\) must be at least two networks"):
        Twins([net()])
