"""Networks of a user's own: found, built, checked, given embeddings, filled with weights, partly frozen."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from fedlabel.config import ConfigError, load_config
from fedlabel.models import Embedded, ModelConfig, Net, build_model, is_foreign, pass_model, passed, receive
from fedlabel.models import own as own_module
from tests.models.own_nets import Plain, linear

NETS = "tests.models.own_nets"
SHAPE = (1, 8, 8)


def build(
    name: str = f"{NETS}:Plain", shape: tuple[int, int, int] = SHAPE, seed: int = 0, **fields: object
) -> nn.Module:
    return build_model(ModelConfig(name=name, **fields), shape, 10, seed)  # type: ignore[arg-type]


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("name", ["Plain", "linear", "named_otherwise", "without_arguments"])
def test_a_function_or_class_gets_what_it_asks_for(name: str) -> None:
    model = build(f"{NETS}:{name}")
    assert model(torch.randn(2, *SHAPE)).shape == (2, 10)
    assert model.training


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(3)
    first, state = build(seed=1), torch.get_rng_state()
    torch.manual_seed(4)
    assert same(first, build(seed=1))
    assert not same(first, build(seed=2))
    torch.manual_seed(3)
    assert torch.equal(state, torch.get_rng_state())


def test_arguments_are_passed_on() -> None:
    assert build(args={"hidden": 5}).fc.in_features == 5  # type: ignore[union-attr]
    config = load_config([], [f"model.name={NETS}:Plain", "model.args={hidden: 5}"])
    assert config.model.args == {"hidden": 5}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "fails",
            r"cannot be built: KeyError: 'no such thing' \(.*own_nets.py, line \d+\). It is called with num_classes",
        ),
        ("no_module", "returns str; it must return a torch.nn.Module"),
        ("wrong_size", r"outputs of shape \(1, 3\) for one input; they must be logits, \(batch, 10\)"),
        ("tuples", "gives tuple; it must give one tensor of logits"),
        ("wants_more", "missing 1 required positional argument: 'depth'"),
        ("NOT_CALLABLE", "is no function or class, but Tensor"),
        ("Plein", "has no Plein. Did you mean Plain"),
    ],
)
def test_what_is_no_network_is_said(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(f"{NETS}:{name}")


def test_outputs_that_look_like_probabilities_are_noted() -> None:
    for name, number in (("probabilities", 1), ("Plain", 0)):
        notes: list[str] = []
        build_model(ModelConfig(name=f"{NETS}:{name}"), SHAPE, 10, 0, notes.append)
        assert len(notes) == number
        assert all("look like probabilities" in note and "Logits are expected" in note for note in notes)


def test_a_network_that_fails_on_the_data_is_said() -> None:
    with pytest.raises(ValueError, match=r"fails on an input of shape \(1, 3, 8, 8\)"):
        build(f"{NETS}:without_arguments", (3, 8, 8))
    with pytest.raises(ValueError, match="cannot be imported: ModuleNotFoundError"):
        build("no_such_module_here:build")


@pytest.mark.parametrize("name", ["a b:c", ":c", "a:", "a:b:c", "../x:y", "python:", "timm:"])
def test_a_name_of_no_form_is_refused_without_importing(name: str) -> None:
    with pytest.raises(ConfigError, match=r"`model.name` \(=.*\) must have"):
        load_config([], [f"model.name='{name}'"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["model.args={a: 1}"], r"`model.args` \(=\{.*\}\) are for a function of your own"),
        (["model.embedding=hidden"], "is for networks that are not ours; cnn has embeddings"),
        (["model.trainable='('"], "must be a regular expression"),
    ],
)
def test_keys_without_a_meaning_are_refused(keys: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([], keys)


def test_foreign_is_what_is_neither_ours_nor_torchvisions() -> None:
    assert [is_foreign(name) for name in ("cnn", "torchvision:resnet18", "timm:x", "python:x#1", "a:b")] == [
        *(False, False, True, True, True)
    ]


# ---------------------------------------------------------------------------------------------- passed from Python


def test_a_module_keeps_its_weights_and_is_not_changed() -> None:
    given = linear(10, SHAPE)
    before = {name: value.clone() for name, value in given.state_dict().items()}
    name = pass_model(given)
    assert name.startswith("python:Sequential#")
    model = build(name, seed=5)
    assert same(model, given)
    with torch.no_grad():
        next(model.parameters()).zero_()
        next(given.parameters()).zero_()  # after it was passed
    assert torch.equal(build(name).state_dict()["1.weight"], before["1.weight"])


def test_the_fingerprint_is_of_weights_or_code() -> None:
    first, second = linear(10, SHAPE), linear(10, SHAPE)
    assert pass_model(first) != pass_model(second)
    second.load_state_dict(first.state_dict())
    assert pass_model(first) == pass_model(second)
    assert pass_model(Plain) == pass_model(Plain) != pass_model(linear)
    assert pass_model(functools.partial(Plain, hidden=3)) != pass_model(functools.partial(Plain, hidden=4))
    assert build(pass_model(functools.partial(Plain, hidden=3))).fc.in_features == 3  # type: ignore[union-attr]


def closing_over(width: Any, nonlinearity: Any = torch.relu) -> Any:
    def make(num_classes: int, scale: float = 1.0) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(width), nn.LazyLinear(num_classes))

    _ = nonlinearity
    return make if nonlinearity is torch.relu else lambda num_classes: nonlinearity(make(num_classes))


class Factory:
    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, num_classes: int) -> nn.Module:
        return closing_over(self.width)(num_classes)  # type: ignore[no-any-return]


def changed(module: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def test_the_fingerprint_is_of_all_that_a_network_is_made_of() -> None:
    """Closures, defaults, partials, attributes of callables and of modules; a global variable is not."""
    base, weights = linear(10, SHAPE), torch.zeros(3)
    different = [
        *(closing_over(4), closing_over(64), closing_over({"a": [4]}), closing_over({"a": [5]})),
        *(closing_over(4, torch.tanh), closing_over(weights), closing_over(weights + 1), closing_over(np.ones(2))),
        *(Factory(4), Factory(5), Factory(4).__call__, functools.partial(closing_over(4), scale=2.0)),
        *(functools.partial(closing_over(64), scale=2.0), base),
        *(changed(copy.deepcopy(base), act=torch.relu), changed(copy.deepcopy(base), act=torch.tanh)),
    ]
    names = [pass_model(each) for each in different]
    assert len(set(names)) == len(names)
    assert names[:4] == [pass_model(closing_over(each)) for each in (4, 64, {"a": [4]}, {"a": [5]})]
    assert names[8] == pass_model(Factory(4))
    assert names[13] == pass_model(copy.deepcopy(base).eval())


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    """Of code without source text, with functions and a set in it, and of a partial: no address of memory counts."""
    script = """if True:
        import functools, torch
        from fedlabel.models import pass_model
        def maker(a):
            inner = lambda: a in {"x", "y", "z"}
            return lambda num_classes, f=torch.relu: [inner(), (lambda: a)()]
        names = [pass_model(maker("b")), pass_model(functools.partial(maker("b"), 1)), pass_model(torch.nn.Linear)]
        module = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(module.weight)
        module.act = torch.nn.functional.gelu
        module.other = maker("b")
        print(names, pass_model(module))
    """
    ran = [
        subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
        for seed in ("1", "2")
    ]
    assert ran[0].stdout == ran[1].stdout != b"", ran[0].stderr


class Extra(nn.Linear):
    def get_extra_state(self) -> object:
        return {"steps": 3}

    def set_extra_state(self, state: object) -> None:
        pass


def test_a_state_that_cannot_be_exchanged_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`model` \(=LazyLinear\) has a lazy layer without a shape as yet \(weight\)"):
        pass_model(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"`model` \(=Extra\): _extra_state of its state dict is no tensor"):
        pass_model(Extra(2, 3))
    with pytest.raises(ValueError, match=r"1._extra_state of its state dict is no tensor"):
        build(pass_model(lambda: nn.Sequential(nn.Flatten(), Extra(SHAPE[0] * SHAPE[1] * SHAPE[2], 10))))
    assert build(pass_model(closing_over(4)))(torch.zeros(1, *SHAPE)).shape == (1, 10)


def test_what_another_process_passed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    name = pass_model(linear(10, SHAPE))
    sent = passed(name)
    monkeypatch.setattr(own_module, "_PASSED", {})
    with pytest.raises(ValueError, match="was passed from Python, and this process has not got it: give the same one"):
        build(name)
    receive(sent)
    assert build(name)(torch.zeros(1, *SHAPE)).shape == (1, 10)
    assert passed("cnn") == {}
    with pytest.raises(ValueError, match=r"`model` \(=int\) must be a torch.nn.Module"):
        pass_model(3)  # type: ignore[arg-type]


def test_timm_is_asked_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="needs the package timm, which is not installed"):
        build("timm:resnet18")
    asked = []

    def create_model(name: str, **keywords: object) -> nn.Module:
        asked.append((name, keywords))
        return linear(10, (3, 8, 8))

    fake = types.SimpleNamespace(list_models=lambda: ["resnet18", "vit"], create_model=create_model)
    monkeypatch.setitem(sys.modules, "timm", fake)
    build("timm:resnet18", (3, 8, 8), args={"drop_rate": 0.1})
    assert asked == [("resnet18", {"pretrained": False, "num_classes": 10, "in_chans": 3, "drop_rate": 0.1})]
    with pytest.raises(ValueError, match="must be one of timm's 2 networks. Did you mean resnet18"):
        build("timm:resnet19")
    with pytest.raises(ValueError, match="must be one of timm's 2 networks"):  # else timm would fetch it
        build("timm:hf-hub:somebody/something")


# ------------------------------------------------------------------------------------------------------ embeddings


def test_a_layers_output_is_the_embedding() -> None:
    model = build(embedding="features")
    assert isinstance(model, Embedded)
    assert isinstance(model, Net)
    assert (model.embedding_size, model.num_classes, model.head) == (16, 10, "fc")
    images = torch.randn(3, *SHAPE)
    model.eval()
    embeddings = model(images, "embed")
    assert torch.equal(embeddings, model.net.features(torch.relu(model.net.norm(model.net.conv(images)))))  # type: ignore
    assert torch.allclose(model(embeddings, "classify"), model(images))
    assert not model.net.features._forward_hooks  # type: ignore[union-attr]


def test_a_feature_map_is_flattened_and_has_no_head() -> None:
    model = build(embedding="conv")
    assert isinstance(model, Embedded)
    assert model(torch.randn(2, *SHAPE), "embed").shape == (2, 4 * 64)
    assert model.head == ""


def test_torchvisions_networks_have_embeddings_too() -> None:
    model = build("torchvision:resnet18", (3, 32, 32), embedding="avgpool")
    assert isinstance(model, Embedded)
    assert (model.embedding_size, model.head) == (512, "fc")


def test_embeddings_of_a_stack_of_networks() -> None:
    nets = [build(embedding="features", seed=seed).eval() for seed in (0, 1)]
    weights, buffers = stack_module_state(nets)
    images = torch.randn(2, 3, *SHAPE)

    def embed(weights: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = functional_call(nets[0], (weights, buffers), (images, "embed"))
        return found

    both = vmap(embed)(weights, buffers, images)
    for place in (0, 1):
        assert torch.allclose(both[place], nets[place](images[place], "embed"), atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "net", "message"),
    [
        ("feature", "Plain", "is no layer of .*the last ones are .*fc. Did you mean features"),
        ("", "Plain", "is no layer"),
        ("2", "twice", "runs 2 times for a batch"),
    ],
)
def test_a_layer_that_gives_no_embedding(layer: str, net: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(f"{NETS}:{net}", embedding=layer)


# -------------------------------------------------------------------------------------------- pretrained and frozen


def test_weights_that_fit_are_loaded_and_the_others_said(tmp_path: Path) -> None:
    donor = Plain(7, SHAPE)  # another number of classes: its fc has another shape
    state = {f"module.{name}": value for name, value in donor.state_dict().items() if name != "conv.bias"}
    torch.save({"state_dict": {**state, "module.more": torch.zeros(1)}, "epoch": 3}, tmp_path / "w.pt")
    notes: list[str] = []
    config = ModelConfig(name=f"{NETS}:Plain", weights=str(tmp_path / "w.pt"))
    model = build_model(config, SHAPE, 10, 0, notes.append)
    assert torch.equal(model.conv.weight, donor.conv.weight)  # type: ignore[union-attr, arg-type]
    fresh = build()
    assert torch.equal(model.fc.weight, fresh.fc.weight)  # type: ignore[union-attr, arg-type]
    assert notes == [
        f"{tmp_path / 'w.pt'}: 8 of 11 arrays were loaded; not in the file, so drawn at random: conv.bias; of another "
        "shape, so drawn at random: fc.weight, fc.bias; not in the network, so left out: more."
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.zeros(1)}, "has no weight that fits the network: it has a, and the network conv.weight"),
        ({}, "holds no state dict"),
        (torch.zeros(3), "holds no state dict"),
        ({"a": 3}, "holds no state dict"),
        (Plain(10, SHAPE), "and no pickled module, which could run code"),
        (None, "there is no such file"),
    ],
)
def test_files_that_hold_no_weights(content: object, message: str, tmp_path: Path) -> None:
    if content is not None:
        torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message):
        build(weights=str(tmp_path / "w.pt"))


def test_only_what_matches_is_trained() -> None:
    model = build(trainable="^(fc|conv)")
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {
        *("fc.weight", "fc.bias", "conv.weight", "conv.bias")
    }
    with pytest.raises(ValueError, match="matches none of the network's 8 parameters, fc.bias, fc.weight"):
        build(trainable="^nothing")


def test_frozen_statistics_stay() -> None:
    """And only those: a layer that is trained keeps counting."""
    for trainable, moves in (("^fc", False), ("^(fc|norm)", True)):
        model = build(trainable=trainable).train()
        norm = model.norm
        assert isinstance(norm, nn.BatchNorm2d)
        images = torch.randn(8, *SHAPE)
        model(images)
        assert bool(norm.running_mean.any()) == moves  # type: ignore[union-attr]
        assert norm.training == moves
    assert same(build(trainable="^fc"), build())
