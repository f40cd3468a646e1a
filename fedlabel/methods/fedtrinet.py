"""FedTriNet: three networks per client pseudo-label its data together: the global one, its own previous one, and a
cross of both.

Source: Che, Long, Wang, Wang, Xiao, Ma, "FedTriNet: A Pseudo Labeling Method with Three Players for Federated
Semi-supervised Learning", IEEE BigData 2021, and its released demonstration. Setting: labels at the clients.

Rounds up to `warmup_rounds`: federated averaging on labelled data, where every client keeps the last layers (the head)
of its own. After them, a client has G, the received model; O, its own model of the last time it trained; N, the
received feature layers under its own head, fine-tuned on labels. Unlabelled samples get the class of the largest
p_G + p_O + p_N if the mean of the three is sure enough, and keep it for good. Then training on labels and pseudo-labels
starts from G, the latter with a weight that ramps up.

What differs, and why:
- In the warm-up the head travels, too, though clients put their own in its place: so there is a global model to
  evaluate at any time, and G has a head when the warm-up ends.
- How many layers are the head is a parameter, 1 by default; the released code shares the first convolutions only.
- The quality threshold falls linearly from `quality_start` to `quality_end` over `quality_rounds`; the paper calls its
  threshold dynamic, the released code has it switched off (quality_start = quality_end = 0).
- Clients keep their own model between rounds, so a simulation holds one model per client.
- The ramp counts communication rounds (50 to 150 in the released code), here from the end of the warm-up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fedlabel.checks import at_least, finite, in_unit_interval
from fedlabel.methods.batch import Batch, Model, Prepared, PseudoLabels, State, StateDict, Step, Survey
from fedlabel.methods.losses import labeled_and, labels_loss, pseudo_cross_entropy, semi_supervised_step
from fedlabel.methods.recipe import BySample, LabelKinds, Memory, Method, Phase, Recipe, Stage, Task
from fedlabel.methods.uploads import ModelPart, PhaseResult, Upload


def head_names(names: Iterable[str], layers: int) -> frozenset[str]:
    """Returns the names of the weights (in the model's order) in its last `layers` layers."""
    given = list(names)
    order = list(dict.fromkeys(name.rpartition(".")[0] for name in given))
    last = set(order[-layers:])
    return frozenset(name for name in given if name.rpartition(".")[0] in last)


def label_together(probs: Sequence[Tensor], threshold: float, earlier: Tensor) -> tuple[Tensor, Tensor]:
    """Pseudo-labels samples by the mean of several networks, once for all later rounds.

    Args:
        probs: (n, classes) probabilities of each network.
        threshold: a sample gets its label if the largest mean probability reaches it.
        earlier: (n,) int64, the label a sample has already, or -1.

    Returns:
        (n,) int64 labels, -1 where there is still none; (n,) float, the largest mean probability.
    """
    confidence, label = torch.stack(list(probs)).mean(0).max(-1)
    fresh = torch.where(confidence >= threshold, label, torch.full_like(label, -1))
    return torch.where(earlier >= 0, earlier, fresh), confidence


def no_pseudo_labels(candidates: Tensor) -> State:
    """Returns the memory of a client that never trained, see `Memory.start`."""
    n, device = len(candidates), candidates.device
    return {
        "pseudo_label": torch.full((n,), -1, dtype=torch.int64, device=device),
        "confidence": torch.zeros(n, device=device),
    }


def own_model(results: Sequence[PhaseResult]) -> StateDict | None:
    """Returns the final state of the phase that trains a client's own model, any but "new"; None if it did not run."""
    return next((result.state for result in results if result.name != "new"), None)


def keep(memory: State, results: Sequence[PhaseResult]) -> State:
    """Keeps the pseudo-labels and the client's own model, which is O in its next round."""
    old = {f"old/{name}": value for name, value in (own_model(results) or {}).items()}
    earlier = {name: value for name, value in memory.items() if name.startswith("old/")}
    return {**earlier, **old, **{name: memory[name] for name in ("pseudo_label", "confidence")}}


def with_own_model(memory: State, global_state: StateDict) -> State:
    """Returns an example of the result of `keep`, see `Memory.like`."""
    return {**memory, **{f"old/{name}": value for name, value in global_state.items()}}


def send_own(
    global_state: StateDict, results: Sequence[PhaseResult], parameters: frozenset[str], weight: float
) -> dict[str, ModelPart]:
    """Sends the client's own model; N stays at the client. Arguments and result: see `Upload.send`."""
    own = own_model(results)
    return {"model": ModelPart(own or dict(global_state), weight if own else 0.0)}


@dataclass(frozen=True)
class FedTriNet(Method):
    """Hyper-parameters of FedTriNet."""

    name: str = "fedtrinet"
    warmup_rounds: int = 40
    """Rounds on labelled data with shared feature layers."""
    head_layers: int = 1
    """How many of the model's last layers are the head."""
    quality_start: float = 0.9
    """Threshold on the mean of the three largest probabilities, after the warm-up."""
    quality_end: float = 0.7
    """The threshold after `quality_rounds` more rounds."""
    quality_rounds: int = 50
    """Rounds over which the threshold changes."""
    ramp_start: int = 0
    """Rounds after the warm-up before pseudo-labels count in the loss."""
    ramp_end: int = 100
    """Rounds after the warm-up from which they count in full."""
    lambda_u: float = 0.5
    """Weight of the pseudo-labelled loss after the ramp."""

    description: ClassVar[str] = "global, old and crossed network label together (Che et al., IEEE BigData 2021)"

    def __post_init__(self) -> None:
        at_least(self, "method", 0, "warmup_rounds", "ramp_start", "quality_rounds")
        at_least(self, "method", 1, "head_layers")
        if self.ramp_end < self.ramp_start:
            raise ValueError(
                f"`method.ramp_end` (={self.ramp_end}) must be at least `method.ramp_start` (={self.ramp_start})."
            )
        in_unit_interval(self, "method", "quality_start", "quality_end")
        finite(self, "method", "lambda_u")

    def recipe(self, task: Task) -> Recipe:
        return Recipe(
            stages=(
                Stage((Phase("warmup", labels_loss, start="crossed"),), rounds=self.warmup_rounds),
                Stage(self.phases),
            ),
            uses=LabelKinds.SINGLE,
            memory=Memory(start=no_pseudo_labels, keep=keep, models=self.models, like=with_own_model),
            upload=Upload(send_own),
        )

    def threshold(self, rounds: int) -> float:
        """Returns the quality threshold `rounds` rounds after the warm-up."""
        progress = min(1.0, rounds / self.quality_rounds) if self.quality_rounds else 1.0
        return self.quality_start + progress * (self.quality_end - self.quality_start)

    def weight(self, rounds: int) -> float:
        """Returns the weight of the pseudo-labelled loss `rounds` rounds after the warm-up."""
        if rounds >= self.ramp_end:
            return self.lambda_u
        if rounds <= self.ramp_start:
            return 0.0
        return self.lambda_u * (rounds - self.ramp_start) / (self.ramp_end - self.ramp_start)

    def phases(self, rounds: int) -> tuple[Phase, ...]:
        """Returns the phases `rounds` rounds after the warm-up."""
        return (
            Phase("new", labels_loss, start="crossed", trains=partial(head_names, layers=self.head_layers)),
            Phase(
                "train",
                partial(self.loss, weight=self.weight(rounds)),
                draw=BySample(unlabeled=("weak",)),
                teachers=("global", "old", "new"),
                prepare=partial(self.prepare, threshold=self.threshold(rounds)),
            ),
        )

    def models(self, global_state: StateDict, memory: State) -> dict[str, StateDict]:
        """Returns O, and the received feature layers under O's head; a client that never trained has the received."""
        old = {name: memory.get(f"old/{name}", value) for name, value in global_state.items()}
        head = head_names(global_state, self.head_layers)
        if len(head) == len(global_state):
            raise ValueError(
                f"`method.head_layers` (={self.head_layers}) covers all layers of the model: nothing would be shared. "
                "Take fewer."
            )
        crossed = {name: old[name] if name in head else value for name, value in global_state.items()}
        return {"old": old, "crossed": crossed}

    def prepare(self, survey: Survey, threshold: float) -> Prepared:
        """Pseudo-labels samples that have none yet; only these samples are drawn."""
        probs = [survey.predict(net, "clean").softmax(-1) for net in ("global", "old", "new")]
        earlier = survey.memory["pseudo_label"]
        label, confidence = label_together(probs, threshold, earlier)
        # What is remembered of a label is how sure it was when it was given.
        confidence = torch.where(earlier >= 0, survey.memory["confidence"].to(confidence.dtype), confidence)
        keep = label >= 0
        guess = torch.where(keep, label, torch.stack(probs).mean(0).argmax(-1))
        pseudo = PseudoLabels(guess, keep, torch.zeros_like(keep), confidence)
        memory = {**survey.memory, "pseudo_label": label, "confidence": confidence}
        return Prepared({"label": guess}, keep, memory, pseudo)

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch, weight: float = 1.0) -> Step:
        """Returns CE(labels) + weight * CE(pseudo-labels), on weak views."""
        supervised, logits = labeled_and(student, batch, "weak")
        label = batch.unlabeled.targets["label"]
        keep = torch.ones_like(label, dtype=torch.bool)
        return semi_supervised_step(supervised, pseudo_cross_entropy(logits.log_softmax(-1), label, keep), weight, keep)
