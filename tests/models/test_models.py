from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from fedlabel.models import MODELS, NO_STATISTICS, ModelConfig, build_model, running_statistics
from fedlabel.models.nets import Net, norm_layer

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]
SMALL = {"cnn", "mlp", "resnet8"}  # cheap enough for many passes
CONVOLUTIONAL = sorted(set(MODELS) - {"mlp"})


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name: str, shape: tuple[int, int, int] = (1, 8, 8), classes: int = 10, seed: int = 0, **fields) -> nn.Module:
    return build_model(ModelConfig(name=name, **fields), shape, classes, seed)


def images(batch: int, shape: tuple[int, int, int], seed: int = 1) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def loss_of(module: nn.Module):
    def loss(parameters: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(module, parameters, (inputs,)), labels)

    return loss


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_have_one_row_per_image_and_every_parameter_gets_a_gradient(name, shape):
    model = build(name, shape, classes=7)
    logits = model(images(2, shape))
    assert logits.shape == (2, 7)
    assert model.eval()(images(2, shape)).shape == (2, 7)
    nn.functional.cross_entropy(logits, torch.tensor([0, 6])).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("cnn", (1, 28, 28), 72_058),
        ("mlp", (1, 28, 28), 101_770),
        ("resnet8", (3, 32, 32), 78_042),
        ("resnet9", (3, 32, 32), 6_573_120),
        ("resnet18", (3, 32, 32), 11_173_962),
        ("resnet34", (3, 32, 32), 21_282_122),
        ("resnet50", (3, 32, 32), 23_520_842),
        ("wrn28_2", (3, 32, 32), 1_467_610),
    ],
)
def test_parameter_counts(name, shape, count):
    """A k x k convolution from a to b channels has k*k*a*b weights (no bias), a norm 2*b, a linear layer a*b + b.

    cnn        25*1*16 + 2*16 + 9*16*32 + 2*32 = 5,104; the maps go 28 -> 14 (stride) -> 7 (max) -> 4 (average, rounded
               up): 32*16 = 512 features; 512*128 + 128 + 128*10 + 10 = 66,954.
    mlp        784*128 + 128 + 128*10 + 10.
    resnet8    stem 27*16 + 32 = 464; block 16-16: 2*9*256 + 2*32 = 4,672; block a-b with 1x1 shortcut:
               9ab + 9bb + ab + 6b: 14,528 and 57,728; head 650.
    resnet18   stem 1,856; 64: 2 blocks of 73,984; 128: 230,144 + 295,424; 256: 919,040 + 1,180,672;
               512: 3,673,088 + 4,720,640; head 5,130. The usual CIFAR ResNet-18 with BatchNorm has as many.
    resnet34   stem 1,856; 64: 3 * 73,984; 128: 230,144 + 3 * 295,424; 256: 919,040 + 5 * 1,180,672;
               512: 3,673,088 + 2 * 4,720,640; head 5,130.
    resnet50   a bottleneck a-b, c = b / 4: ac + 9cc + cb + 2 * (2c + b), and ab + 2b for a shortcut. stem 1,856;
               256: 75,008 + 2 * 70,400; 512: 379,392 + 3 * 280,064; 1024: 1,512,448 + 5 * 1,117,184;
               2048: 6,039,552 + 2 * 4,462,592; head 20,490.
    resnet9    9 * (3*64 + 64*128 + 2*128*128 + 128*256 + 256*512 + 2*512*512) = 6,563,520; norms
               2 * (64 + 3*128 + 256 + 3*512) = 4,480; head without bias 5,120.
    wrn28_2    the 1.47 M of the FixMatch paper. A pre-activation block a-b: 2a + 9ab + 2b + 9bb, and ab for a shortcut.
               stem 432; 16-32, 3 x 32-32: 14,432 + 3 * 18,560; 32-64, 3 x 64-64: 57,536 + 3 * 73,984;
               64-128, 3 x 128-128: 229,760 + 3 * 295,424; last norm 256; head 1,290.
    """
    model = build(name, shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("name", MODELS)
def test_the_gradients_of_three_stacked_models_equal_one_by_one(name):
    shape = (1, 8, 8)
    models = [build(name, shape, seed=seed) for seed in range(3)]
    inputs = torch.stack([images(3, shape, seed) for seed in range(3)])
    labels = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    parameters, buffers = stack_module_state(models)
    assert buffers == {}
    stacked = vmap(grad(loss_of(models[0])))(parameters, inputs, labels)
    for position, model in enumerate(models):
        loss = nn.functional.cross_entropy(model(inputs[position]), labels[position])
        for key, alone in zip(stacked, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            torch.testing.assert_close(stacked[key][position], alone, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize("name", MODELS)
def test_an_empty_batch_gives_no_logits_zero_gradients_and_no_nan(name, norm):
    model = build(name, norm=norm)
    logits = model(torch.empty(0, 1, 8, 8))
    assert logits.shape == (0, 10)
    logits.sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert model.eval()(torch.empty(0, 1, 8, 8)).shape == (0, 10)


@pytest.mark.parametrize("name", MODELS)
def test_with_group_norm_a_sample_does_not_depend_on_its_batch(name):
    shape = (3, 32, 32) if name in SMALL else (1, 8, 8)
    model = build(name, shape).train()
    batch = images(4, shape)
    other = torch.cat([batch[:1], 10 * images(3, shape, seed=2) + 5])
    torch.testing.assert_close(model(batch)[0], model(other)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_with_batch_norm_it_does_and_there_are_running_statistics(name):
    model = build(name, norm="batch").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = images(4, (1, 8, 8))
    other = torch.cat([batch[:1], 10 * images(3, (1, 8, 8), seed=2) + 5])
    assert not torch.allclose(model(batch)[0], model(other)[0], rtol=1e-2, atol=1e-2)
    buffers = [key for key, _ in model.named_buffers()]
    norms = sum(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    assert norms > 0
    assert len(buffers) == 3 * norms
    assert all(not torch.equal(before[key], model.state_dict()[key]) for key in buffers)


@pytest.mark.parametrize("norm", ["group", "none"])
@pytest.mark.parametrize("name", MODELS)
def test_without_batch_norm_the_state_is_parameters_in_float32(name, norm):
    model = build(name, norm=norm)
    assert list(model.state_dict()) == [key for key, _ in model.named_parameters()]
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_norm_none_has_no_normalisation_but_biases(name):
    model = build(name, norm="none")
    assert not any(isinstance(part, (nn.GroupNorm, nn.BatchNorm2d)) for part in model.modules())
    assert all(part.bias is not None for part in model.modules() if isinstance(part, nn.Conv2d))
    assert torch.isfinite(model(images(2, (1, 8, 8)))).all()


def test_state_keys_of_the_default_model_are_stable():
    """Checkpoints and messages name tensors by these keys."""
    assert list(build("cnn").state_dict()) == [
        "conv1.weight",
        "norm1.weight",
        "norm1.bias",
        "conv2.weight",
        "norm2.weight",
        "norm2.bias",
        "hidden.weight",
        "hidden.bias",
        "output.weight",
        "output.bias",
    ]


@pytest.mark.parametrize(("channels", "groups"), [(16, 8), (32, 8), (24, 8), (12, 6), (7, 7), (11, 1)])
def test_group_norm_takes_the_largest_divisor_up_to_eight(channels, groups):
    assert norm_layer("group", channels).num_groups == groups


@pytest.mark.parametrize("name", ["cnn", "mlp", "resnet8", "resnet50", "wrn28_2", "torchvision:resnet18"])
def test_weights_are_a_function_of_the_seed_and_the_global_generator_is_left_alone(name):
    shape = (3, 32, 32)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build(name, shape, seed=2**62).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = build(name, shape, seed=2**62).state_dict()
    third = build(name, shape, seed=1).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_models_are_picklable(name):
    model = build(name)
    batch = images(2, (1, 8, 8))
    assert torch.equal(pickle.loads(pickle.dumps(model))(batch), model(batch))


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 5, 9), (2, 17, 30), (3, 64, 48)])
def test_cnn_head_fits_any_size(shape):
    assert build("cnn", shape)(images(2, shape)).shape == (2, 10)


@pytest.mark.parametrize("name", [name for name, entry in MODELS.items() if entry.min_side > 1])
def test_the_smallest_image_is_accepted_and_a_smaller_one_named_in_the_error(name):
    side = MODELS[name].min_side
    assert build(name, (1, side, side))(images(2, (1, side, side))).shape == (2, 10)
    with pytest.raises(ValueError, match=rf"`model.name` \(={name}\) .*1x{side}x{side - 1}.* at least {side}x{side}"):
        build(name, (1, side, side - 1))


def test_width_and_hidden_scale_the_model():
    model = build("cnn", width=2, hidden=50)
    assert model.conv1.out_channels == 32
    assert model.conv2.out_channels == 64
    assert model.hidden.out_features == 50
    assert build("mlp", hidden=50).hidden.out_features == 50
    assert build("resnet8", width=2).output.in_features == 128
    assert build("resnet9", width=2).output.in_features == 1024
    assert build("resnet18", width=2).output.in_features == 1024
    assert build("wrn28_2", width=2).output.in_features == 256


@pytest.mark.parametrize("name", MODELS)
def test_the_embedding_is_what_the_last_linear_layer_gets(name):
    """ResNet-9 divides by 8 what comes out of that layer."""
    model = build(name).train()
    batch, seen = images(3, (1, 8, 8)), []
    model.output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = model(batch)
    embeddings = model(batch, "embed")
    assert isinstance(model, Net)
    assert len(seen) == 1  # embedding alone does not classify
    assert embeddings.shape == (3, model.output.in_features)
    assert torch.equal(embeddings, seen[0])
    assert torch.equal(model(embeddings, "classify"), logits)
    assert torch.equal(model.embed(batch), embeddings)
    assert torch.equal(model.classify(embeddings), logits)
    assert torch.equal(model.output(embeddings) * (0.125 if name == "resnet9" else 1), logits)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_both_halves_of_stacked_models_run_with_weights_that_are_handed_in(name):
    models = [build(name, seed=seed) for seed in range(3)]
    inputs = torch.stack([images(4, (1, 8, 8), seed) for seed in range(3)])
    parameters, _ = stack_module_state(models)

    def halves(state: dict[str, Tensor], batch: Tensor) -> tuple[Tensor, Tensor]:
        embeddings = functional_call(models[0], state, (batch, "embed"))
        return embeddings, functional_call(models[0], state, (embeddings, "classify"))

    embeddings, logits = vmap(halves)(parameters, inputs)
    for place, model in enumerate(models):
        torch.testing.assert_close(embeddings[place], model(inputs[place], "embed"), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[place], model(inputs[place]), rtol=1e-4, atol=1e-5)


def test_the_hidden_layers_of_mlp():
    """On 30 features: 30 * 16 + 16 + 16 * 8 + 8 + 8 * 4 + 4 + 4 * 2 + 2 = 678; ReLU after each but the last."""
    model = build("mlp", (30, 1, 1), classes=2, hidden_layers=[16, 8, 4])
    assert sum(parameter.numel() for parameter in model.parameters()) == 678
    features = images(5, (30, 1, 1))
    by_hand = features.flatten(1)
    for layer in (model.hidden, *model.deeper):
        by_hand = layer(by_hand).clamp_min(0)
    assert torch.equal(model(features, "embed"), by_hand)
    assert torch.equal(model(features), model.output(by_hand))
    assert hash(ModelConfig(name="mlp", hidden_layers=[16, 8])) == hash(ModelConfig(name="mlp", hidden_layers=(16, 8)))


def test_one_hidden_layer_is_the_default_of_mlp():
    """Runs of earlier versions must come out the same: weights drawn from the same seed, under the same names."""
    default, named = (build("mlp", hidden=50, hidden_layers=layers).state_dict() for layers in ((), (50,)))
    assert list(default) == ["hidden.weight", "hidden.bias", "output.weight", "output.bias"]
    assert all(torch.equal(default[key], named[key]) for key in default)
    assert default["hidden.weight"].flatten()[:3].tolist() == pytest.approx([-0.00093, 0.06705, -0.10288], abs=1e-5)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_a_table_is_refused_by_all_but_mlp(name):
    with pytest.raises(
        ValueError, match=rf"`model.name` \(={name}\) is for images.*rows of a table \(30 .*: take model.name=mlp"
    ):
        build(name, (30, 1, 1))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_torchvision_models_take_grey_and_colour(shape):
    model = build("torchvision:resnet18", shape, classes=7)
    assert model.training
    assert model(images(2, shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("torchvision:alexnet", (3, 28, 28), r"torchvision:alexnet\) does not accept images of shape 3x28x28"),
        ("torchvision:vit_b_32", (3, 32, 32), r"torchvision:vit_b_32\) does not accept images of shape 3x32x32"),
        ("torchvision:resnet18", (2, 32, 32), r"shape 2x32x32 .* it needs 1 or 3 channels"),
    ],
)
def test_torchvision_models_refuse_shapes_they_cannot_take(name, shape, message):
    with pytest.raises(ValueError, match=message):
        build(name, shape)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "resnet81"}, r"`model.name` \(=resnet81\) must be one of cnn, mlp, .*Did you mean resnet8"),
        ({"name": "zzz"}, r"wrn28_2, torchvision:<name>, timm:<name> or package.module:function\.$"),
        ({"name": "torchvision:resnt18"}, r"Did you mean torchvision:resnet18"),
        ({"name": "torchvision:googlenet"}, r"whose only output is logits"),
        ({"norm": "layer"}, r"`model.norm` \(=layer\) must be one of group, batch, none\."),
        ({"width": 0}, r"`model.width` \(=0\) must lie in \[1, 65536\]"),
        ({"hidden": -3}, r"`model.hidden` \(=-3\) must lie in \[1, 1048576\]"),
        (
            {"name": "mlp", "hidden_layers": (8, 0)},
            r"`model.hidden_layers` \(=\[8, 0\]\) must be at most 100 widths in",
        ),
        ({"hidden_layers": (8,)}, r"`model.hidden_layers` \(=\[8\]\) is for model.name=mlp, not cnn"),
    ],
)
def test_configuration_errors_name_key_value_and_what_is_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)


def test_running_statistics_are_found_by_layer() -> None:
    """Not by name: a parameter or buffer called running_var is none."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3), nn.InstanceNorm1d(3)), nn.GroupNorm(1, 3))
    model.register_buffer("running_var", torch.zeros(1))
    model.add_module("tracked", nn.InstanceNorm1d(3, track_running_stats=True))
    found = running_statistics(model)
    assert found.means == {"1.0.running_mean", "tracked.running_mean"}
    assert found.variances == {"1.0.running_var", "tracked.running_var"}
    assert found.counters == {"1.0.num_batches_tracked", "tracked.num_batches_tracked"}
    assert running_statistics(nn.BatchNorm1d(3)).variances == {"running_var"}
    assert running_statistics(nn.GroupNorm(1, 3)) == NO_STATISTICS
