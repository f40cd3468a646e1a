"""How clients and the server train: steps, optimiser, weights in the mean."""

from __future__ import annotations

from dataclasses import dataclass

from fedlabel.checks import at_least, finite, in_unit_interval, one_of, positive

WEIGHT_BY = ("processed", "size", "uniform")
OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainingConfig:
    """Training of a client in one round. The optimiser is fresh in every phase of every round."""

    lr: float = 0.1
    """Learning rate."""
    optimizer: str = "sgd"
    """sgd | adamw: torch's AdamW, with its defaults except `lr` and `weight_decay`; it is invariant to the scale of the
    loss, which for bags may grow with their size."""
    batch_size: int = 32
    """Samples per step; a client with fewer uses all it has."""
    local_steps: int | None = 15
    """Steps per phase. Set to null to count in `local_epochs` instead."""
    local_epochs: int | None = None
    """Passes per phase over the samples that the phase draws from: the unlabelled ones if it draws both; if a method
    uses all supervision (ill), the pool that needs more steps."""
    unlabeled_ratio: int = 1
    """mu: unlabelled samples per labelled one in a step: `unlabeled_ratio * batch_size` of them are drawn."""
    unlabeled_includes_labeled: bool = False
    """Whether labelled samples are also drawn as unlabelled ones, without their label (FixMatch's authors, SAGE)."""
    momentum: float = 0.0
    """For sgd."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = 0.0
    """sgd: L2 penalty in the gradient; adamw: decoupled weight decay."""
    max_grad_norm: float | None = None
    """The gradient's Euclidean norm is clipped to this in every step; null: no clipping."""
    prox_mu: float = 0.0
    """FedProx, with every method: weight of (mu / 2) * ||w - w_global||^2 in every phase on the clients."""
    server_steps: int | None = None
    """Steps of the server after each round, if it holds labels (supervision.labels_at=server); null: as clients."""
    server_batch_size: int | None = None
    """Samples per step of the server; null: `batch_size`."""
    weight_by: str = "processed"
    """A client's weight in the server's mean (FedLabel's merge=mean has its own). processed: number of samples its
    losses used this round, over all steps (FedLabel's r_k); size: number of samples it holds of the kinds the method
    draws from; uniform: 1. A client whose losses used no sample (nothing passed the threshold, say) has weight 0 with
    each."""

    precision: str = "float32"
    """float32 | bfloat16: what networks compute in while clients train (weights, losses and posteriors stay float32;
    convolutions on a GPU may use TF32). bfloat16 pays on a GPU, for networks with BatchNorm; it changes results."""

    def __post_init__(self) -> None:
        one_of(self, "training", precision=PRECISIONS)
        positive(self, "training", "lr")
        at_least(self, "training", 1, "batch_size", "unlabeled_ratio")
        at_least(self, "training", 1, "server_batch_size", null=True)
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError(
                f"`training.local_steps` (={self.local_steps}) and `training.local_epochs` (={self.local_epochs}): "
                "exactly one must be set; set the other to null."
            )
        at_least(self, "training", 0, "local_steps", "local_epochs", "server_steps", null=True)
        in_unit_interval(self, "training", "momentum", below_one=True)
        one_of(self, "training", optimizer=OPTIMIZERS, weight_by=WEIGHT_BY)
        if self.optimizer != "sgd" and (self.momentum > 0 or self.nesterov):
            raise ValueError(
                f"`training.momentum` (={self.momentum}) must be 0 and `training.nesterov` (={self.nesterov}) false "
                f"for training.optimizer={self.optimizer}, which has moments of its own."
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError("`training.nesterov` (=True) needs `training.momentum` (=0) above 0.")
        finite(self, "training", "weight_decay", "prox_mu")
        positive(self, "training", "max_grad_norm", null=True)
