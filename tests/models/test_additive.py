"""A model that is a sum of parts behaves as the plain network at the sum of their weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedlabel.learning.client import frozen_model
from fedlabel.models import ModelConfig, build_model
from fedlabel.models.additive import Additive

SCALES = {"sigma": 1.0, "psi": 0.2}


def net(norm: str = "group", seed: int = 0) -> nn.Module:
    return build_model(ModelConfig(name="resnet8", norm=norm), (1, 8, 8), 4, seed)


def images(n: int = 5) -> torch.Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def scaled(model: nn.Module, factor: float) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(factor)
    return other


def test_starts_as_the_network_at_the_sum_of_the_scales() -> None:
    """sigma = w and psi = .2 w: the net is at 1.2 w; names are "part.name" and every part has all weights."""
    plain = net()
    model = Additive(plain, SCALES)
    torch.testing.assert_close(model(images()), scaled(plain, 1.2)(images()))
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == [f"{part}.{name}" for part in SCALES for name in names]
    for name, value in plain.named_parameters():
        assert torch.equal(model.state_dict()[f"sigma.{name}"], value)
        assert torch.equal(model.state_dict()[f"psi.{name}"], 0.2 * value)
    assert model(images(0)).shape == (0, 4)


def test_halves_are_those_of_the_network_at_the_sum() -> None:
    plain, model = scaled(net(), 1.2), Additive(net(), SCALES)
    torch.testing.assert_close(model(images(), "embed"), plain(images(), "embed"))
    torch.testing.assert_close(model(model(images(), "embed"), "classify"), plain(images()))


def test_worked_number() -> None:
    """w = 3, b = 1: at 1 + .5 - 2 times it the logit of x = 2 is -.5 (3 * 2 + 1) = -3.5."""
    plain = nn.Linear(1, 1)
    with torch.no_grad():
        plain.weight.fill_(3.0)
        plain.bias.fill_(1.0)
    model = Additive(plain, {"a": 1.0, "b": 0.5, "c": -2.0})
    assert model(torch.tensor([[2.0]])).item() == pytest.approx(-3.5)


def test_each_part_has_the_gradient_of_the_sum_and_can_be_frozen_by_itself() -> None:
    plain, model = net(), Additive(net(), SCALES)
    reference = scaled(plain, 1.2)
    reference(images()).square().mean().backward()
    model(images()).square().mean().backward()
    for name, parameter in reference.named_parameters():
        for part in SCALES:
            torch.testing.assert_close(model.get_parameter(f"{part}.{name}").grad, parameter.grad)
    frozen = Additive(net(), SCALES)
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(name.startswith("psi."))
    frozen(images()).square().mean().backward()
    for name, parameter in frozen.named_parameters():
        assert (parameter.grad is not None) == name.startswith("psi."), name


def test_parts_share_no_memory_with_each_other_or_the_template() -> None:
    plain = net()
    before = copy.deepcopy(plain.state_dict())
    model = Additive(plain, {"sigma": 1.0, "psi": 1.0})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("psi."):
                parameter.zero_()
    for name, value in before.items():
        assert torch.equal(plain.state_dict()[name], value)
        assert torch.equal(model.state_dict()[f"sigma.{name}"], value)
    torch.testing.assert_close(model(images()), plain(images()))
    assert model(images()).requires_grad
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.sigma.parameters(), strict=True))


def test_batch_norms_statistics_are_the_first_parts() -> None:
    """In training they are gathered there and nowhere else; in evaluation they are used from there."""
    plain, model = scaled(net("batch"), 1.2), Additive(net("batch"), SCALES)
    start = copy.deepcopy(model.state_dict())
    for _ in range(2):
        torch.testing.assert_close(model(images()), plain(images()))
    gathered = 0
    for name, value in plain.named_buffers():
        torch.testing.assert_close(model.state_dict()[f"sigma.{name}"], value)
        assert torch.equal(model.state_dict()[f"psi.{name}"], start[f"psi.{name}"])
        gathered += not torch.equal(value, start[f"sigma.{name}"])
    assert gathered > 0
    torch.testing.assert_close(model.eval()(images()), plain.eval()(images()))


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_state_that_lacks_a_part_borrows_it_as_it_is_at_the_call(norm: str) -> None:
    """Another client's psi, on top of the lender's sigma of the moment; the lender gets neither change nor gradient."""
    lender, module = Additive(net(norm), SCALES), Additive(net(norm, 7), SCALES)
    other = {name: value for name, value in Additive(net(norm, 1), SCALES).state_dict().items() if "psi." in name}
    lender(images())  # running statistics of its own
    helper = frozen_model(module, other, lender)
    expected = Additive(net(norm), SCALES)
    for shift in (0.0, 0.1):
        with torch.no_grad():
            for name, parameter in lender.named_parameters():
                parameter.add_(shift if name.startswith("sigma.") else 0.0)
        before = copy.deepcopy(lender.state_dict())
        expected.load_state_dict({**lender.state_dict(), **other})
        logits = helper(images())
        torch.testing.assert_close(logits, expected.eval()(images()))
        assert not logits.requires_grad
        assert all(torch.equal(value, before[name]) for name, value in lender.state_dict().items())
    full = frozen_model(module, lender.state_dict())
    torch.testing.assert_close(full(images()), lender.eval()(images()))
