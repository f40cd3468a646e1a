"""What a run refuses once its network is built."""

import pytest
from torch import nn

from fedlabel.config import load_config
from fedlabel.experiment import Experiment


def experiment(*overrides: str) -> Experiment:
    return Experiment(load_config([], ["device=cpu", *overrides]))


BATCH_CNN = ["model.name=cnn", "model.norm=batch"]
CLIPPED = [f"strategy.args.{key}=1" for key in ("noise_multiplier", "clipping_norm", "num_sampled_clients")]


@pytest.mark.parametrize(
    ("strategy", "overrides", "buffer"),
    [
        ("FedAdam", BATCH_CNN, "running_mean"),
        ("FedAvgM", BATCH_CNN, "running_mean"),
        ("QFedAvg", [*BATCH_CNN, "strategy.args.client_learning_rate=0.1"], "running_mean"),
        ("DifferentialPrivacyServerSideFixedClipping", [*BATCH_CNN, *CLIPPED], "running_mean"),
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
