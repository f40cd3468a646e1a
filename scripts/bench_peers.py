"""The job `supervised` of bench_engine.py in other frameworks: apple's pfl 0.6 and Flower's simulation runtime.

Both train fedlabel's network on the same samples, with the same number of steps and learning rate. pfl gets each
client's images as normalised floats, made beforehand, as its own benchmarks do, and takes them in a fixed order; its
last batch of an epoch is smaller where the batch size does not divide the samples. `bench_engine.py` starts this file:

    python bench_peers.py FRAMEWORK JOB.json RESULT.json        # JOB: see `Job`; pfl on two processes: by torchrun

Flower's runtime finds the app `bench_peers:app` in its workers, and the job in the variable BENCH_JOB.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedlabel.models import MODELS, ModelConfig, ModelEntry, Net, build_model


class Job(NamedTuple):
    data: str
    """The .npz file of `bench_engine.py`."""
    clients: int
    cohort: int
    batch: int
    model: str
    lr: float
    rounds: int
    """Timed ones; one more comes first."""
    device: str = "cpu"


class PflCnn(Net):
    """The simple CNN of pfl's CIFAR10 benchmark, without its dropout: two 3x3 convolutions without padding,
    max-pooling, one hidden layer.
    """

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.conv1, self.conv2 = torch.nn.Conv2d(channels, 32, 3), torch.nn.Conv2d(32, 64, 3)
        self.hidden = torch.nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128)
        self.output = torch.nn.Linear(128, num_classes)

    def embed(self, images: Tensor) -> Tensor:
        features = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(images)))), 2)
        return F.relu(self.hidden(features.flatten(1)))


def register() -> None:
    """Makes `PflCnn` a model of fedlabel, in this process."""
    MODELS["pfl_cnn"] = ModelEntry("pfl's CNN for CIFAR10", 6, lambda config, shape, classes: PflCnn(shape, classes))


def network(job: Job, shape: tuple[int, int, int]) -> torch.nn.Module:
    register()
    return build_model(ModelConfig(name=job.model), shape, 10, seed=0)


@lru_cache(maxsize=1)
def load(job: Job) -> list[tuple[Tensor, Tensor]]:
    """Returns normalised images and labels of each client."""
    with np.load(job.data) as arrays:
        images, labels = torch.from_numpy(arrays["x_train"]), torch.from_numpy(arrays["y_train"]).long()
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
    values = images.float() / 255
    values = (values - values.mean((0, 2, 3), keepdim=True)) / values.std((0, 2, 3), keepdim=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).chunk(job.clients)
    return [(values[rows].to(job.device), labels[rows].to(job.device)) for rows in order]


def seconds_between(ends: list[float]) -> list[float]:
    return [end - begin for begin, end in itertools.pairwise(ends)]


# --------------------------------------------------------------------------------------------------------- pfl


def run_pfl(job: Job) -> dict[str, Any]:
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.internal.ops import pytorch_ops
    from pfl.internal.ops.selector import set_framework_module
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    set_framework_module(pytorch_ops)
    torch.set_num_threads(1)
    np.random.seed(0)  # noqa: NPY002 - pfl draws from it
    clients = load(job)
    net = network(job, tuple(clients[0][0].shape[1:]))

    class WithLoss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def loss(self, x: Tensor, y: Tensor, is_eval: bool = False) -> Tensor:
            self.train(not is_eval)
            return F.cross_entropy(self.net(x), y)

        def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
            return {}

    module = WithLoss()
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), 1.0))
    users = list(range(job.clients))
    datasets = [PyTorchTensorDataset(tensors) for tensors in clients]
    federation = FederatedDataset(datasets.__getitem__, get_user_sampler("minimize_reuse", users))
    ends: list[float] = []

    class Clock(TrainingProcessCallback):
        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):  # type: ignore[no-untyped-def]
            if job.device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            return False, Metrics()

    FederatedAveraging().run(
        NNAlgorithmParams(job.rounds + 1, 10**9, job.cohort, None),
        SimulatedBackend(federation, federation),
        model,
        NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=job.lr, local_batch_size=job.batch, local_max_grad_norm=None
        ),
        NNEvalHyperParams(local_batch_size=job.batch),
        [Clock()],
        send_metrics_to_platform=False,
    )
    return {"rounds": seconds_between(ends)}


# ------------------------------------------------------------------------------------------------------ Flower


def train(message: Any, context: Any) -> Any:
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    job = Job(**json.loads(os.environ["BENCH_JOB"]))
    torch.set_num_threads(1)
    x, y = load(job)[int(context.node_config["partition-id"])]
    model = _resident(job, tuple(x.shape[1:]))
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), job.lr)
    for rows in torch.randperm(len(x)).split(job.batch):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(x)})}
    return Message(RecordDict(content), reply_to=message)


_resident = lru_cache(maxsize=1)(network)


def __getattr__(name: str) -> Any:
    """Makes Flower's app where it is asked for: pfl's processes need not have Flower."""
    if name != "app":
        raise AttributeError(name)
    from flwr.clientapp import ClientApp

    globals()["app"] = made = ClientApp()
    made.train()(train)
    return made


def run_flower(job: Job) -> dict[str, Any]:
    import bench_peers  # by the name under which workers find it
    from flwr.app import ArrayRecord
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    os.environ["BENCH_JOB"] = json.dumps(job._asdict())
    ends: list[float] = []

    class Timed(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            replies = list(replies)
            if sum(reply.has_content() for reply in replies) != job.cohort:
                raise RuntimeError(f"Only {len(replies)} of {job.cohort} clients answered.")
            aggregated = super().aggregate_train(server_round, replies)
            ends.append(time.perf_counter())
            return aggregated

    server_app = ServerApp()

    @server_app.main()
    def main(grid: Any, context: Any) -> None:
        strategy = Timed(
            fraction_train=job.cohort / job.clients,
            fraction_evaluate=0.0,
            min_train_nodes=job.cohort,
            min_available_nodes=job.clients,
        )
        first = network(job, tuple(load(job)[0][0].shape[1:])).state_dict()
        strategy.start(grid=grid, initial_arrays=ArrayRecord(first), num_rounds=job.rounds + 1)

    run_simulation(
        server_app,
        bench_peers.app,
        num_supernodes=job.clients,
        backend_config={
            "init_args": {"address": "local", "num_cpus": 2, "logging_level": "error", "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    return {"rounds": seconds_between(ends)}


def main() -> None:
    framework, job_path, result = sys.argv[1:]
    job = Job(**json.loads(Path(job_path).read_text()))
    found = {"pfl": run_pfl, "flower": run_flower}[framework](job)
    found["mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if os.environ.get("RANK", "0") == "0":
        Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
