"""LLP-BP: belief propagation computes labels from bag counts and neighbours, a learner is trained on them, its
embeddings give a better graph, and a fresh learner is trained on the labels from that (Havaldar et al., "Learning from
Label Proportions: Bootstrapping Supervised Learners via Belief Propagation", ICLR 2024, arXiv 2310.08056).

Bags, graph and beliefs stay at the client; the learner is federated, and the server says when a stage ends. What
differs from the released code, each a field: one exact factor per bag instead of all its pairs (`factor`), a length
scale of the kernel (`length_scale`), and what a model says of each sample as further evidence (`evidence`). Labels
and candidate sets are evidence, too, and there may be several classes. A sample that nothing reaches is not learnt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fedlabel.checks import at_least, finite, in_unit_interval, one_of, positive, within
from fedlabel.data.labels.supervision import Supervision
from fedlabel.inference.belief import FACTORS, Beliefs, marginals
from fedlabel.inference.cardinality import LARGEST
from fedlabel.inference.class_belief import class_marginals
from fedlabel.inference.neighbors import BACKENDS, Graph, neighbor_graph
from fedlabel.inference.sums import add_at
from fedlabel.methods.bags import bag_means, bag_step, shares
from fedlabel.methods.batch import Batch, Model, Prepared, PseudoLabels, State, Step, Survey
from fedlabel.methods.dllp import dllp_loss
from fedlabel.methods.losses import mean_metric, one_hot
from fedlabel.methods.recipe import ByBag, LabelKinds, Memory, Method, Phase, Recipe, Stage, Start, Task
from fedlabel.methods.uploads import PhaseResult
from fedlabel.models.wrap import Network, one_network, one_network_with_embeddings, with_bag_head

RULES = ("threshold", "top_count", "soft")
EVIDENCE = ("none", "previous", "current")
UNDECIDED = 1e-6
"""A belief this near to an even one, in no bag, says nothing."""


def top_count_labels(belief: Tensor, bag: Tensor, counts: Tensor, otherwise: Tensor) -> Tensor:
    """Returns (n,) bool, in each bag the counts[b] samples of highest belief; ties go to the first.

    Args:
        belief: (n,).
        bag: (n,) int64, -1 for none.
        counts: (bags,) int64.
        otherwise: (n,) bool, for samples in no bag.
    """
    order = belief.argsort(descending=True, stable=True)
    order = order[bag[order].argsort(stable=True)]  # by bag, and in it by belief
    place = torch.arange(len(bag), device=bag.device)
    first = torch.searchsorted(bag[order].contiguous(), bag[order].contiguous())
    chosen = torch.zeros_like(otherwise)
    limit = torch.cat([counts, counts.new_zeros(1)])[bag[order]]  # -1 takes the last
    chosen[order] = place - first < limit
    return torch.where(bag >= 0, chosen, otherwise)


def centering(coupling: Tensor, log_odds: float) -> Tensor:
    """Returns h, (e,), the correction to the log-odds of both ends of an edge that makes its messages zero for labels
    of `log_odds`.

    exp(h (z_i + z_j) - a (z_i - z_j)^2) then leaves them these very log-odds: with x = exp(log_odds + h), b = exp(-a)
    and o = exp(log_odds), x^2 + b (1 - o) x - o = 0.

    Args:
        coupling: (e,) a = lambda_edge K.
        log_odds: log of ones by zeros.
    """
    odds = math.exp(log_odds)
    half = (-coupling).exp() * (1 - odds) / 2
    return ((half.square() + odds).sqrt() - half).log() - log_odds


def empty_memory(candidates: Tensor) -> State:
    """Returns the memory of a client that never trained, see `Memory.start`."""
    nothing = torch.zeros(0, candidates.shape[1], device=candidates.device)
    return {
        "belief": nothing,
        "stage": torch.tensor(-1.0, device=candidates.device),
        "edges": torch.zeros(0, 2, dtype=torch.int64, device=candidates.device),
        "weight": nothing[:, 0],
    }


@dataclass(frozen=True)
class LLPBP(Method):
    """Stages of `stage_rounds` rounds: beliefs at each client, once a stage, and a fresh learner trained on them."""

    name: str = "llp_bp"
    description: ClassVar[str] = "bags: beliefs from counts and neighbours, then a learner of them"

    num_stages: int = 2
    """Number of stages. The first graph is built from the samples, the others from their embeddings by the learner of
    the previous stage."""
    stage_rounds: int = 10
    """Rounds of a stage; the last one goes on to the end of the run."""
    num_neighbors: int = 5
    """k of the graph; 0: no graph, bags are independent (with evidence=current the E step of GLWS)."""
    max_distance: float = 2.0
    """Neighbours at this cosine distance or more are not connected; 2: all are."""
    length_scale: float | None = None
    """Scale of the kernel exp(-distance / length_scale); null: the median distance of neighbours. The paper: 1."""
    backend: str = "sklearn"
    """sklearn: exact neighbours. faiss (an extra): for clients with hundreds of thousands of samples."""
    factor: str = "cardinality"
    """cardinality: one exact factor per bag. pairwise: the paper's, all pairs of a bag; it often does not converge."""
    lambda_bag: float = math.inf
    """Weight of the squared error of a bag's count; .inf: counts are exact. pairwise and noisy counts need a number."""
    lambda_edge: float = 1.0
    """Weight of two neighbours with different labels, times the kernel."""
    centered: bool = False
    """Ours, two classes: neighbours agree relative to the client's share of ones. The paper's coupling is symmetric: if
    ones are rare, more neighbours make a zero more likely. See `centering`."""
    damping: float = 0.5
    """Share of the old message in the new one."""
    max_iterations: int = 200
    """Most iterations of belief propagation."""
    rule: str = "threshold"
    """Training targets. threshold: the most probable class (of two: 1 from `threshold` on). top_count: in each bag as
    many samples as counted, those with the highest belief; two classes. soft: the beliefs themselves."""
    threshold: float = 0.5
    """For rule=threshold and two classes."""
    evidence: str = "none"
    """Prior evidence of a label. none: the paper's. previous: the prediction of the previous stage's learner. current:
    the global model's prediction, updated in every round except a stage's first, in which the model is untrained."""
    evidence_weight: float = 1.0
    """Multiplies the log-odds of the evidence."""
    lambda_aggregate: float = 0.1
    """Weight of the loss on bags, of a second output for means of embeddings; 0: no such output."""
    head_hidden: int = 64
    """Width of that output's hidden layer."""

    def __post_init__(self) -> None:
        one_of(self, "method", factor=FACTORS, backend=BACKENDS, rule=RULES, evidence=EVIDENCE)
        at_least(self, "method", 1, "num_stages", "stage_rounds", "max_iterations", "head_hidden")
        at_least(self, "method", 0, "num_neighbors", "lambda_bag")
        finite(self, "method", "lambda_edge", "evidence_weight", "lambda_aggregate")
        positive(self, "method", "length_scale", null=True)
        in_unit_interval(self, "method", "damping", below_one=True)
        within(self, "method", 0, 2, "max_distance", ends="(]")
        within(self, "method", 0, 1, "threshold", ends="()")
        if self.factor == "pairwise" and self.lambda_bag == math.inf:
            raise ValueError(
                "`method.lambda_bag` (=inf) must be finite for method.factor=pairwise: a count that cannot be missed "
                "is no sum of pairs. Take e.g. method.lambda_bag=10, or method.factor=cardinality."
            )
        if self.evidence == "previous" and self.num_stages == 1:
            raise ValueError("`method.evidence` (=previous) needs method.num_stages (=1) of at least 2.")

    def check_rounds(self, num_rounds: int) -> None:
        if num_rounds <= (self.num_stages - 1) * self.stage_rounds:
            raise ValueError(
                f"`num_rounds` (={num_rounds}) ends before the last of `method.num_stages` (={self.num_stages}) of "
                f"`method.stage_rounds` (={self.stage_rounds}) begins: take more rounds, or fewer or shorter stages."
            )

    def recipe(self, task: Task) -> Recipe:
        if task.num_classes > 2 and (self.rule == "top_count" or self.factor == "pairwise" or self.centered):
            raise ValueError(
                f"`method.rule` (={self.rule}), `method.factor` (={self.factor}) and `method.centered` "
                f"(={self.centered}): with {task.num_classes} classes rule=top_count, factor=pairwise and "
                "centered=true have no place; leave them out, or set data.positive_classes for two classes."
            )
        if task.labels.noisy_counts and self.lambda_bag == math.inf:
            raise ValueError(
                "`method.lambda_bag` (=inf) takes counts for exact, and with `supervision.count_epsilon` they have "
                "noise: take a number, e.g. method.lambda_bag=1."
            )
        stages = tuple(
            Stage(
                partial(self._phases, stage),
                rounds=self.stage_rounds if stage < self.num_stages - 1 else None,
                name=f"stage {stage + 1} of {self.num_stages}",
                start=Start.FRESH,
            )
            for stage in range(self.num_stages)
        )
        return Recipe(
            stages,
            uses=LabelKinds.TRUE | LabelKinds.SETS | LabelKinds.BAGS | LabelKinds.AT_SERVER,
            network=self._network(),
            memory=Memory(start=empty_memory, keep=self.keep),
        )

    def _network(self) -> Network:
        if self.lambda_aggregate > 0:
            return with_bag_head(self.head_hidden)
        return one_network_with_embeddings if self.num_stages > 1 else one_network

    def _phases(self, stage: int, round_in_stage: int) -> tuple[Phase, ...]:
        before = ("previous",) if stage > 0 else ()
        current = ("global",) if self.evidence == "current" else ()
        prepare = partial(self.prepare, stage=stage, fresh=round_in_stage == 1)
        return (Phase("train", self.loss, draw=ByBag(singles=True), teachers=before + current, prepare=prepare),)

    # ------------------------------------------------------------------------------------------------------- E step

    def prepare(self, survey: Survey, stage: int, fresh: bool = False) -> Prepared:
        """Runs belief propagation on the client's bags and neighbours, unless that was done in this stage.

        Args:
            survey: of the client's samples.
            stage: from 0.
            fresh: whether the global model is as it was drawn: it is then no evidence.
        """
        supervision, memory = survey.supervision, survey.memory
        n, classes = supervision.candidates.shape
        belief, metrics, pairs = memory["belief"], {}, None
        if len(belief) != n or int(memory["stage"]) != stage or self.evidence == "current":
            graph = self._graph(survey, stage)
            beliefs = self.infer(supervision, graph, self._evidence(survey, stage, fresh))
            belief, pairs = beliefs.probability.float(), graph.edges
            metrics = self._metrics(beliefs, belief, supervision)
            memory = {**memory, "belief": belief, "stage": torch.tensor(float(stage), device=belief.device)}
            if self.evidence == "current":
                memory |= {"edges": graph.edges, "weight": graph.weight}
        label = self.label(belief, supervision)
        reached = (supervision.bag >= 0) | (belief.amax(1) > 1 / classes + UNDECIDED)
        pseudo = PseudoLabels(label, reached, torch.zeros_like(reached), belief.gather(1, label[:, None]).squeeze(1))
        target = (belief if self.rule == "soft" else one_hot(label, classes)) * reached[:, None]
        return Prepared({"target": target}, memory=memory, pseudo=pseudo, metrics=metrics, pairs=pairs)

    def _graph(self, survey: Survey, stage: int) -> Graph:
        """Returns the graph of a stage: with evidence=current, which needs it in every round, the stored one."""
        memory = survey.memory
        if int(memory["stage"]) == stage and len(memory["belief"]) == len(survey.supervision.candidates):
            return Graph(memory["edges"], memory["weight"])
        features = survey.inputs() if stage == 0 else survey.predict("previous", "clean", "embed")
        return neighbor_graph(
            features.flatten(1), self.num_neighbors, self.max_distance, self.length_scale, self.backend
        )

    def _evidence(self, survey: Survey, stage: int, fresh: bool) -> Tensor:
        """Returns (n, classes) log-evidence from a model's predictions; 0 without evidence."""
        previous, current = "previous" if stage > 0 else None, None if fresh else "global"
        who = {"none": None, "previous": previous, "current": current}[self.evidence]
        if who is None:
            return torch.zeros_like(survey.supervision.candidates, dtype=torch.float32)
        return self.evidence_weight * survey.predict(who, "clean").log_softmax(-1)

    def infer(self, supervision: Supervision, graph: Graph, evidence: Tensor) -> Beliefs:
        """Returns the beliefs (n, classes) of all samples, in double precision.

        Args:
            supervision: bags, and candidates; noisy ones are not evidence.
            graph: of neighbours.
            evidence: (n, classes) logarithms.

        Raises:
            ValueError: the labels and the counts of a bag contradict each other.
        """
        possible = supervision.candidates | supervision.noisy[:, None]
        log_probs = evidence.double().masked_fill(~possible, -math.inf)
        weight = graph.weight.double()
        if possible.shape[1] > 2:
            return class_marginals(
                log_probs,
                supervision.bag,
                supervision.bag_counts,
                graph.edges,
                weight,
                self.lambda_bag / 2,  # of two classes the same as below
                self.lambda_edge / 2,
                self.damping,
                self.max_iterations,
            )
        log_odds = log_probs[:, 1] - log_probs[:, 0]
        zeros, ones = supervision.bag_counts.sum(0).tolist()
        if self.centered and ones > 0 and zeros > 0:
            field = centering(self.lambda_edge * weight, math.log(ones / zeros))
            log_odds = log_odds.clone()
            for ends in graph.edges.unbind(1):
                add_at(log_odds, ends, field)
        beliefs = marginals(
            log_odds.clamp(-LARGEST, LARGEST) if self.factor == "pairwise" else log_odds,  # it allows no certainty
            supervision.bag,
            supervision.bag_counts[:, 1],
            graph.edges,
            weight,
            self.lambda_bag,
            self.lambda_edge,
            self.factor,
            self.damping,
            self.max_iterations,
        )
        return beliefs._replace(probability=torch.stack([1 - beliefs.probability, beliefs.probability], 1))

    def label(self, belief: Tensor, supervision: Supervision) -> Tensor:
        """Returns (n,) int64, the class of each sample by `rule`, of beliefs (n, classes)."""
        if belief.shape[1] > 2:
            return belief.argmax(1)
        above = belief[:, 1] >= self.threshold
        if self.rule == "top_count":
            above = top_count_labels(belief[:, 1], supervision.bag, supervision.bag_counts[:, 1], above)
        return above.long()

    def _metrics(self, beliefs: Beliefs, belief: Tensor, supervision: Supervision) -> dict[str, Tensor]:
        bag, counts = supervision.bag, supervision.bag_counts
        inside = bag >= 0
        sums = add_at(torch.zeros_like(counts, dtype=belief.dtype), bag[inside], belief[inside])
        missed = (sums - counts).abs().sum(1) / 2  # of two classes: of the count of one
        one = torch.ones(1, device=belief.device)

        def once(value: float) -> Tensor:
            return mean_metric(one * value, one)

        return {
            "belief/converged": once(float(beliefs.converged)),
            "belief/iterations": once(float(beliefs.iterations)),
            "belief/residual": once(beliefs.residual),
            "belief/bag_residual": mean_metric(missed, torch.ones_like(missed)),
        }

    # ------------------------------------------------------------------------------------------------------- M step

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        """Returns the cross-entropy of the samples to their labels, plus that of their bags' mean embeddings."""
        part = batch.labeled
        images, target = part.views["weak"], part.targets["target"]
        if self.lambda_aggregate == 0:
            logits = student(images)
        else:
            embeddings = student(images, "embed")
            logits = student(embeddings, "classify")
        values = -(target * logits.log_softmax(-1)).sum(-1)
        learnt = target.sum(-1) > 0
        loss = values.sum() / learnt.sum().clamp_min(1)
        metrics, examples = {"train/loss_beliefs": mean_metric(values, learnt)}, learnt.sum()
        if self.lambda_aggregate > 0:
            predicted = student(bag_means(embeddings, part.members), "bags").log_softmax(-1)
            of_bags = bag_step(dllp_loss(predicted, shares(part)), logits, part)
            loss = loss + self.lambda_aggregate * of_bags.loss
            examples = torch.maximum(examples, of_bags.examples)
            metrics |= {
                "train/loss_aggregate": of_bags.metrics["train/loss"],
                "bag/share_error": of_bags.metrics["bag/share_error"],
            }
        metrics["train/loss"] = torch.stack([loss, torch.ones_like(loss)]).detach()
        return Step(loss, metrics, examples)

    # ------------------------------------------------------------------------------------------------------- memory

    def keep(self, memory: State, results: Sequence[PhaseResult]) -> State:
        """Returns the beliefs of the stage and, if they are updated in every round, its graph."""
        kept = ("belief", "stage", "edges", "weight") if self.evidence == "current" else ("belief", "stage")
        return {name: memory[name] for name in kept}
