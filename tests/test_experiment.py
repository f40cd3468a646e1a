"""What a run refuses once its data are there and its network is built."""

import pytest
from torch import nn

from fedlabel.config import load_config
from fedlabel.experiment import Experiment


def experiment(*overrides: str) -> Experiment:
    return Experiment(load_config([], ["device=cpu", *overrides]))


BATCH_CNN = ["model.name=cnn", "model.norm=batch"]


@pytest.mark.parametrize(
    ("strategy", "overrides", "buffer"),
    [
        ("FedAdam", BATCH_CNN, "running_mean"),
        ("FedAvgM", BATCH_CNN, "running_mean"),
        ("QFedAvg", [*BATCH_CNN, "strategy.args.client_learning_rate=0.1"], "running_mean"),
        (
            "FedAdam",
            ["model.name=torchvision:resnet18"],
            r"net.bn1.running_mean, net.bn1.running_var, .* \(60 in all\)",
        ),
        ("FedAdam", ["model.name=torchvision:shufflenet_v2_x0_5", "model.norm=none"], "running_mean"),  # keeps its own
    ],
)
def test_running_statistics_are_not_optimised(strategy: str, overrides: list[str], buffer: str) -> None:
    with pytest.raises(ValueError, match=rf"`strategy.name` \(={strategy}\) would apply .*{buffer}.*weighted_mean or"):
        experiment(*overrides, f"strategy.name={strategy}")


@pytest.mark.parametrize(
    "overrides",
    [
        ["strategy.name=FedAdam", "model.norm=group"],
        ["strategy.name=FedAdam", "model.name=mlp", "model.norm=batch"],  # mlp has no norm
        ["strategy.name=FedMedian", "model.name=torchvision:resnet18"],
        ["model.name=torchvision:resnet18"],
    ],
)
def test_networks_without_running_statistics_and_strategies_that_average_are_taken(overrides: list[str]) -> None:
    experiment(*overrides)


TINY = ["num_clients=2", "data.train_samples=100", "model.name=mlp", "model.hidden_layers=[8]"]


def test_several_models_need_the_weighted_mean() -> None:
    """FedLabel's released code sends two of them, with weights of their own."""
    two = (
        r"`method.name` \(=fedlabel\) sends 2 models with separate weights \(supervised, unlabeled\), which "
        r"`strategy.name` \(=FedAdam\) cannot combine; use strategy.name=weighted_mean, or .* method.merge=sum"
    )
    with pytest.raises(ValueError, match=two):
        experiment(*TINY, "method.merge=mean", "strategy.name=FedAdam")
    experiment(*TINY, "method.merge=mean")
    experiment(*TINY, "strategy.name=FedAdam")


NOISE = [*TINY, "supervision.kind=bags", "supervision.bag_size=5", "supervision.count_epsilon=1"]
LABELS, COUNTS = (
    "kind: few_labels, label_rate: 0.5, share: 0.5",
    "kind: bags, bag_size: 5, count_epsilon: 1, share: 0.5",
)


@pytest.mark.parametrize(
    "noise", [NOISE, [*TINY, f"supervision.mix=[{{{LABELS}}}, {{{COUNTS}}}]"]], ids=["all clients", "some"]
)
def test_counts_with_noise_are_not_taken_for_exact(noise: list[str]) -> None:
    exact = r"`method.lambda_bag` \(=inf\) takes counts for exact, and with `supervision.count_epsilon` they have noise"
    with pytest.raises(ValueError, match=exact):
        experiment(*noise, "method.name=llp_bp")
    assert experiment(*noise, "method.name=llp_bp", "method.lambda_bag=1").labels.noisy_counts
    assert experiment(*noise, "method.name=dllp").labels.noisy_counts
    without = [override.replace(", count_epsilon: 1", "") for override in noise if "epsilon=" not in override]
    assert not experiment(*without, "method.name=llp_bp").labels.noisy_counts


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(3),
        nn.SyncBatchNorm(3),
        nn.InstanceNorm2d(3, track_running_stats=True),
        nn.BatchNorm3d(3, affine=False),
    ],
)
def test_every_layer_with_running_statistics_is_seen(layer: nn.Module) -> None:
    trained = experiment("strategy.name=FedAdam")
    with pytest.raises(ValueError, match="0.inner.running_mean, 0.inner.running_var"):
        trained._check_strategy(nn.Sequential(nn.ModuleDict({"inner": layer})))
    for plain in (nn.InstanceNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3)):
        trained._check_strategy(plain)
