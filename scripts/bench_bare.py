"""Bare loops: the arithmetic of a round of federated learning in plain PyTorch, with nothing around it.

What `bench_engine.py` and `bench_gpu.py` compare the runtime with. A loop has the method's formulas written out from
its paper, one model, torch's SGD, a copy of the weights per client and a running weighted mean. Of fedlabel it takes
the models, the augmentation, the data and the seeds, so that a loop draws the same samples and views as the runtime,
and its mean loss of every round should be the runtime's `train/loss`.

As a program it checks that: python scripts/bench_bare.py
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlabel.config import ExperimentConfig, load_config, to_yaml
from fedlabel.data.augment import strong, weak
from fedlabel.experiment import open_experiment
from fedlabel.seeding import Draws, derive_seed, numpy_generator, torch_generator

Weights = dict[str, Tensor]


class Client(NamedTuple):
    """What a client trains on."""

    images: Tensor
    """(n, channels, height, width) uint8."""
    candidates: Tensor
    """(n, classes) bool; one candidate is a label, all are none."""
    labeled: Tensor
    """Rows with a label, or with any set that is not of all classes: int64, on the CPU."""
    unlabeled: Tensor
    """The other rows."""


class Trained(NamedTuple):
    """What a client's round gives besides the weights of the student."""

    examples: float
    """Samples that its losses used."""
    loss: Tensor
    """(sum, number) of what the mean loss is taken over."""


class BareLoop:
    """Rounds of one configuration.

    Args:
        config: methods supervised, fedlabel, fixmatch and ill (candidate sets without noise), each as it is by default;
            SGD without momentum; one kind of label.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        experiment = open_experiment(to_yaml(config))
        self.config, self.device, self._allow_flip = config, experiment.device, experiment.transform.allow_flip
        self._mean, self._std = experiment.transform.mean, experiment.transform.std
        self.clients = [self._client(experiment.client_data(number)) for number in range(config.num_clients)]
        self.student: nn.Module = copy.deepcopy(experiment.trainer.student)
        self.student.load_state_dict(experiment.initial_state)
        self.student.train()
        self.teachers = [copy.deepcopy(self.student).eval().requires_grad_(False) for _ in range(2)]
        self.weights: Weights = {name: p.detach().clone() for name, p in self.student.named_parameters()}
        train: Callable[[Client, int], tuple[Weights, Trained]] = getattr(self, f"_{config.method.name}")
        self._train = train

    def _client(self, data) -> Client:  # type: ignore[no-untyped-def]
        candidates = data.supervision.candidates
        size, classes = candidates.sum(1).cpu(), candidates.shape[1]
        has = size < classes if self.config.method.name == "ill" else size == 1
        return Client(data.images, candidates, has.nonzero().flatten(), (~has).nonzero().flatten())

    def round(self, number: int) -> float:
        """Runs a round; returns the mean loss."""
        config = self.config
        cohort = numpy_generator(config.seed, "cohort", number).choice(
            config.num_clients, size=config.cohort_size, replace=False
        )
        total = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        examples, loss = 0.0, torch.zeros(2, device=self.device)
        for client in sorted(map(int, cohort)):
            seed = derive_seed(config.seed, "client", client, "round", number)
            trained, result = self._train(self.clients[client], seed)
            for name, value in trained.items():
                total[name].add_(value, alpha=result.examples)
            examples += result.examples
            loss += result.loss
        if examples:
            self.weights = {name: value / examples for name, value in total.items()}
        return float(loss[0] / loss[1])

    # ------------------------------------------------------------------------------------------------- methods

    def _supervised(self, client: Client, seed: int) -> tuple[Weights, Trained]:
        self._load(self.student, self.weights)
        result = self._on_labels(client, seed)
        return {name: p.detach() for name, p in self.student.named_parameters()}, result

    def _on_labels(self, client: Client, seed: int) -> Trained:
        """Cross-entropy on labels."""
        optimizer, augment = self._optimizer(), self._chance(seed, "supervised")
        labels = client.candidates.int().argmax(1)
        loss_sum, examples = torch.zeros(2, device=self.device), 0
        for rows in self._draws(client.labeled, self.config.training.batch_size, seed, "supervised", "labeled"):
            x, y = self._weak(client.images[rows], augment), labels[rows]
            loss = F.cross_entropy(self.student(x), y)
            self._step(optimizer, loss)
            loss_sum += torch.stack([loss.detach() * len(rows), loss.new_tensor(float(len(rows)))])
            examples += len(rows)
        return Trained(float(examples), loss_sum)

    def _fedlabel(self, client: Client, seed: int) -> tuple[Weights, Trained]:
        """Cho et al., ICCV 2023, equations (1) to (10)."""
        method, training = self.config.method, self.config.training
        received, (global_model, local_model) = self.weights, self.teachers
        self._load(self.student, received)
        on_labels = self._on_labels(client, seed)
        local = {name: p.detach().clone() for name, p in self.student.named_parameters()}
        self._load(global_model, received)
        self._load(local_model, local)
        self._load(self.student, received)
        optimizer, augment = self._optimizer(), self._chance(seed, "unlabeled")
        loss_sum, kept_samples = torch.zeros(2, device=self.device), torch.zeros((), device=self.device)
        for rows in self._draws(
            client.unlabeled, training.batch_size * training.unlabeled_ratio, seed, "unlabeled", "unlabeled"
        ):
            images = client.images[rows]
            plain, changed = self._normalize(images), self._strong(images, augment)
            with torch.no_grad():
                g, k = global_model(plain).log_softmax(1), local_model(plain).log_softmax(1)
                p, q = g.exp(), k.exp()
                h_g, h_k = p.var(1), q.var(1)
                from_global = (h_g >= h_k)[:, None]
                largest, label = torch.where(from_global, p, q).max(1)
                keep = largest > method.confidence_threshold
                pulled = keep & (torch.where(from_global, q, p).argmax(1) == label)
                weight = method.lambda_0 * torch.minimum(h_g, h_k) / torch.maximum(h_g, h_k)
                target = torch.where(from_global, k, g)
            on_strong, on_plain = self.student(torch.cat([changed, plain])).log_softmax(1).tensor_split(2)
            nll = torch.where(keep, F.nll_loss(on_strong, label, reduction="none"), 0.0)
            kl = torch.where(pulled, weight * (target.exp() * (target - on_plain)).sum(1), 0.0)
            kept = keep.sum()
            if self.device.type != "cpu" or kept:
                self._step(optimizer, (nll.sum() + kl.sum()) / kept.clamp_min(1))
            loss_sum += torch.stack([(nll + kl).detach().sum(), kept.float()])
            kept_samples += kept
        sent = {name: local[name] + (p.detach() - received[name]) for name, p in self.student.named_parameters()}
        return sent, Trained(on_labels.examples + float(kept_samples), on_labels.loss + loss_sum)

    def _fixmatch(self, client: Client, seed: int) -> tuple[Weights, Trained]:
        """Sohn et al., NeurIPS 2020, equations (3) and (4)."""
        method, training = self.config.method, self.config.training
        self._load(self.student, self.weights)
        optimizer, augment = self._optimizer(), self._chance(seed, "train")
        labels = client.candidates.int().argmax(1)
        more = training.batch_size * training.unlabeled_ratio
        loss_sum, examples = torch.zeros(2, device=self.device), torch.zeros((), device=self.device)
        for few, many in zip(
            self._draws(client.labeled, training.batch_size, seed, "train", "labeled"),
            self._draws(client.unlabeled, more, seed, "train", "unlabeled"),
            strict=True,
        ):
            x, y = self._weak(client.images[few], augment), labels[few]
            images = client.images[many]
            mild, changed = self._weak(images, augment), self._strong(images, augment)
            with torch.no_grad():
                confidence, label = self.student(mild).softmax(1).max(1)
                keep = confidence >= method.confidence_threshold
            logits, on_strong = self.student(torch.cat([x, changed])).split([len(few), len(many)])
            nll = torch.where(keep, F.cross_entropy(on_strong, label, reduction="none"), 0.0)
            loss = F.cross_entropy(logits, y) + method.lambda_u * nll.mean()
            self._step(optimizer, loss)
            loss_sum += torch.stack([loss.detach(), torch.ones_like(loss)])
            examples += keep.sum() + len(few)
        return {name: p.detach() for name, p in self.student.named_parameters()}, Trained(float(examples), loss_sum)

    def _ill(self, client: Client, seed: int) -> tuple[Weights, Trained]:
        """Chen et al., NeurIPS 2024, for candidate sets: a label where one class is left, else EM."""
        self._load(self.student, self.weights)
        optimizer, augment = self._optimizer(), self._chance(seed, "train")
        information = torch.where(client.candidates, 0.0, -torch.inf)
        loss_sum, examples = torch.zeros(2, device=self.device), 0
        for rows in self._draws(client.labeled, self.config.training.batch_size, seed, "train", "labeled"):
            images, allowed = client.images[rows], information[rows]
            mild, changed = self._weak(images, augment), self._strong(images, augment)
            on_weak, on_strong = self.student(torch.cat([mild, changed])).log_softmax(1).tensor_split(2)
            q = (on_weak.detach() + allowed).softmax(1)
            certain = client.candidates[rows].sum(1) == 1
            terms = torch.where(certain, -(on_weak + allowed).logsumexp(1), -(q * on_strong).sum(1))
            loss = terms.mean()
            self._step(optimizer, loss)
            loss_sum += torch.stack([loss.detach(), torch.ones_like(loss)])
            examples += len(rows)
        return {name: p.detach() for name, p in self.student.named_parameters()}, Trained(float(examples), loss_sum)

    # --------------------------------------------------------------------------------------------------- parts

    def _draws(self, rows: Tensor, batch: int, seed: int, *scope: str) -> Iterator[Tensor]:
        """Yields the rows of each step: shuffled passes, cut without a gap."""
        training = self.config.training
        generator, size = torch_generator(seed, *scope), min(batch, len(rows))
        steps = (
            training.local_steps if training.local_epochs is None else training.local_epochs * -(-len(rows) // batch)
        )
        order = rows[:0]
        for _ in range(steps or 0):
            while len(order) < size:
                order = torch.cat([order, rows[torch.randperm(len(rows), generator=generator)]])
            yield order[:size].to(self.device)
            order = order[size:]

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), self.config.training.lr)

    def _chance(self, seed: int, phase: str) -> Draws:
        return Draws(torch_generator(seed, phase, "augment"))

    def _normalize(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self._mean) / self._std

    def _weak(self, images: Tensor, draws: Draws) -> Tensor:
        return self._normalize(weak(images, draws, self.config.augment, self._allow_flip))

    def _strong(self, images: Tensor, draws: Draws) -> Tensor:
        return self._normalize(strong(images, draws, self.config.augment, self._allow_flip))

    @staticmethod
    def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @staticmethod
    def _load(model: nn.Module, weights: Weights) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])


def timed(loop: BareLoop, rounds: int) -> tuple[list[float], list[float]]:
    """Returns the seconds of each of `rounds` rounds, and those of this process on a CPU, after one that does not
    count.
    """
    wall, cpu = [], []
    for number in range(1, rounds + 2):
        started, busy = time.perf_counter(), time.process_time()
        loop.round(number)
        if loop.device.type == "cuda":
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - busy)
    return wall[1:], cpu[1:]


def deviation(overrides: Sequence[str], rounds: int = 2) -> float:
    """Returns the largest relative difference of the runtime's `train/loss` from that of the bare loop."""
    from server.simulation import simulate

    config = load_config((), [*overrides, f"num_rounds={rounds}"])
    with tempfile.TemporaryDirectory() as out:
        losses = [row["train/loss"] for row in simulate(config, name="check", out=out).metrics]
    loop = BareLoop(config)
    bare = [loop.round(number) for number in range(1, rounds + 1)]
    return max(abs(ours - theirs) / theirs for ours, theirs in zip(losses, bare, strict=True))


METHODS = {
    "supervised": ["supervision.kind=full"],
    "fedlabel": ["supervision.label_rate=0.1"],
    "fixmatch": ["supervision.label_rate=0.1"],
    "ill": ["supervision.kind=partial", "supervision.partial_ratio=0.3"],
}
"""The kind of label that each method is compared on."""


def main() -> None:
    torch.set_num_threads(1)
    small = ["device=cpu", "num_clients=4", "fraction_train=1", "training.local_steps=5", "evaluation.figures=false"]
    worst = 0.0
    for method, labels in METHODS.items():
        found = deviation([*small, *labels, f"method.name={method}", "partition.kind=iid"])
        print(f"{method}: train/loss of two rounds differs by {found:.1e} of it")
        worst = max(worst, found)
    if worst > 1e-3:
        sys.exit(f"A bare loop is not the arithmetic of the runtime: {worst:.1e} apart. See {Path(__file__).name}.")


if __name__ == "__main__":
    main()
