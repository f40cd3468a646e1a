"""What methods make of the user's network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedlabel.models.additive import Additive
from fedlabel.models.bag_head import BagHead
from fedlabel.models.labeling_heads import LabelingHeads
from fedlabel.models.nets import Mlp
from fedlabel.models.twins import Twins
from fedlabel.models.wrap import (
    Network,
    one_network,
    one_network_with_embeddings,
    sum_of_parts,
    twins,
    with_bag_head,
    with_labeling_heads,
)

NETWORKS = {
    "one_network": one_network,
    "one_network_with_embeddings": one_network_with_embeddings,
    "twins": twins(3),
    "sum_of_parts": sum_of_parts({"sigma": 1.0, "psi": 0.25}),
    "with_bag_head": with_bag_head(7),
    "with_labeling_heads": with_labeling_heads(4),
}


def build(place: int) -> Mlp:
    with torch.random.fork_rng():
        torch.manual_seed(place)
        return Mlp((1, 2, 2), 3, (5,))


def weights(module: nn.Module) -> dict[str, list[float]]:
    return {name: value.flatten().tolist() for name, value in module.state_dict().items()}


def wrapped(network: Network, seed: int = 1) -> nn.Module:
    return network.wrap(build, seed)


@pytest.mark.parametrize("network", [one_network, one_network_with_embeddings])
def test_one_network_is_the_users(network: Network) -> None:
    assert isinstance(wrapped(network), Mlp)
    assert weights(wrapped(network)) == weights(build(0))


def test_twins_are_networks_of_different_weights() -> None:
    module = wrapped(twins(3))
    assert isinstance(module, Twins)
    assert [weights(one) for one in module.networks] == [weights(build(place)) for place in range(3)]
    assert len(wrapped(twins()).networks) == twins().count == 2  # type: ignore[arg-type]


def test_parts_start_at_their_share_of_the_weights() -> None:
    module, one = wrapped(NETWORKS["sum_of_parts"]), weights(build(0))
    assert isinstance(module, Additive)
    assert weights(module.get_submodule("sigma")) == one
    quarter = {name: [0.25 * value for value in values] for name, values in one.items()}
    assert weights(module.get_submodule("psi")) == quarter


def test_heads_are_put_on_the_users_network() -> None:
    bags, functions = wrapped(with_bag_head(7)), wrapped(with_labeling_heads(4))
    assert isinstance(bags, BagHead)
    assert isinstance(functions, LabelingHeads)
    assert bags.bag_hidden.out_features == 7
    assert functions(torch.zeros(2, 1, 2, 2), "heads").shape == (2, 4, 3 + 1)
    assert weights(bags.net) == weights(functions.net) == weights(build(0))


@pytest.mark.parametrize("name", ["with_bag_head", "with_labeling_heads"])
def test_heads_are_a_function_of_the_seed_and_leave_the_global_generator_alone(name: str) -> None:
    before = torch.get_rng_state()
    first = weights(wrapped(NETWORKS[name]))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert weights(wrapped(NETWORKS[name])) == first
    assert weights(wrapped(NETWORKS[name], seed=2)) != first


def test_heads_of_their_own_need_embeddings() -> None:
    with pytest.raises(AssertionError, match="needs embeddings"):
        with_bag_head(7).wrap(lambda place: nn.Linear(1, 1), 0)


@pytest.mark.parametrize(
    ("name", "count", "embeds"),
    [
        ("one_network", 1, False),
        ("one_network_with_embeddings", 1, True),
        ("twins", 3, False),
        ("sum_of_parts", 1, False),
        ("with_bag_head", 1, True),
        ("with_labeling_heads", 1, True),
    ],
)
def test_what_is_said_of_them(name: str, count: int, embeds: bool) -> None:
    """`count` is how many of the user's networks a pass goes through."""
    network = NETWORKS[name]
    assert (network.count, network.embeds, network.input_gradients) == (count, embeds, False)
    passes = 0

    def counted(place: int) -> Mlp:
        def count_pass(*_: object) -> None:
            nonlocal passes
            passes += 1

        model = build(place)
        model.register_forward_hook(count_pass)
        return model

    if name != "sum_of_parts":  # copies the network
        network.wrap(counted, 0)(torch.zeros(2, 1, 2, 2))
        assert passes == count
