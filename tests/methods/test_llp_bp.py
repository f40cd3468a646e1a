"""LLP-BP: beliefs at the client, what is learnt of them, stages, and the whole method on made-up data."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedlabel.data.augment import AugmentConfig
from fedlabel.data.labels.supervision import Supervision
from fedlabel.inference.belief import marginals
from fedlabel.inference.cardinality import bag_posterior
from fedlabel.inference.neighbors import Graph, neighbor_graph
from fedlabel.learning.client import ClientData, Trainer, train_client
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.learning.views import ImageTransform
from fedlabel.methods.bags import bag_recipe, of_bags
from fedlabel.methods.batch import Batch, Survey
from fedlabel.methods.dllp import dllp_bag_loss
from fedlabel.methods.llp_bp import LLPBP, centering, empty_memory, top_count_labels
from fedlabel.methods.recipe import ByBag, LabelKinds, Start
from fedlabel.models.bag_head import BagHead
from fedlabel.models.nets import Mlp
from fedlabel.models.wrap import one_network, one_network_with_embeddings
from tests.methods.batches import make_batch
from tests.methods.recipes import task

NO_GRAPH = Graph(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0))


def in_bags(labels: Tensor, size: int, classes: int = 2) -> Supervision:
    bag = torch.arange(len(labels)) // size
    counts = torch.stack([torch.bincount(labels[bag == b], minlength=classes) for b in range(int(bag.max()) + 1)])
    supervision = Supervision.certain(torch.ones(len(labels), classes, dtype=torch.bool))
    return replace(supervision, bag=bag, bag_counts=counts)


def gaussians(n: int = 1024, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two Gaussians in 8 dimensions that differ in 2 of them, 30 % positive: section 3's set."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(n, generator=generator) < 0.3).long()
    x = torch.randn(n, 8, generator=generator)
    x[:, :2] += 4 * labels[:, None] - 2.0
    return x, labels


def belief(method: LLPBP, x: Tensor, supervision: Supervision) -> Tensor:
    graph = neighbor_graph(x, method.num_neighbors, method.max_distance, method.length_scale)
    return method.infer(supervision, graph, torch.zeros(supervision.candidates.shape)).probability


@pytest.mark.parametrize(("size", "least"), [(8, 0.95), (32, 0.93), (128, 0.9)])
def test_beliefs_find_the_labels_from_counts_and_neighbours(size: int, least: float) -> None:
    """Check 14: far above what the bags' shares alone tell; features shuffled against labels destroy it."""
    x, labels = gaussians()
    supervision = in_bags(labels, size)
    method = LLPBP(lambda_bag=10, lambda_edge=10, length_scale=1.0)
    auc = roc_auc_score(labels, belief(method, x, supervision)[:, 1])
    share = (supervision.bag_counts[:, 1] / supervision.bag_counts.sum(1))[supervision.bag]
    assert auc > least
    assert auc > roc_auc_score(labels, share) + 0.2
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
    assert roc_auc_score(labels, belief(method, shuffled, supervision)[:, 1]) < roc_auc_score(labels, share) + 0.05


def test_beliefs_fall_with_bag_size_and_beat_smoothed_shares_and_pairs() -> None:
    """Check 14, means of three sets: the exact factor above .98, least in the largest bags; above the mean share of a
    sample's and its neighbours' bags, and above the form of pairs."""
    found: dict[int, dict[str, float]] = {}
    for size in (8, 32, 128):
        scores: dict[str, list[float]] = {}
        for seed in range(3):
            x, labels = gaussians(seed=seed)
            supervision = in_bags(labels, size)
            share = (supervision.bag_counts[:, 1] / supervision.bag_counts.sum(1))[supervision.bag]
            edges = neighbor_graph(x, 5).edges
            ends = torch.cat([edges, edges.flip(1), torch.arange(len(x))[:, None].expand(-1, 2)])
            smoothed = torch.zeros(len(x)).index_add_(0, ends[:, 0], share[ends[:, 1]]) / torch.bincount(ends[:, 0])
            method = LLPBP(lambda_bag=10, lambda_edge=10, length_scale=1.0)
            pairs = replace(method, factor="pairwise")
            for name, values in {
                "exact": belief(method, x, supervision)[:, 1],
                "pairs": belief(pairs, x, supervision)[:, 1],
                "smoothed": smoothed,
            }.items():
                scores.setdefault(name, []).append(float(roc_auc_score(labels, values)))
        found[size] = {name: sum(values) / 3 for name, values in scores.items()}
    exact = [scores["exact"] for scores in found.values()]
    assert exact[0] >= exact[1] >= exact[2] > 0.98
    for scores in found.values():
        assert scores["exact"] > scores["smoothed"] + 0.02
        assert scores["exact"] > scores["pairs"] + 0.2


def test_the_pairwise_form_reports_that_it_does_not_converge() -> None:
    x, labels = gaussians(256)
    graph, supervision = neighbor_graph(x), in_bags(labels, 8)
    nothing = torch.zeros(256, 2)
    oscillating = LLPBP(factor="pairwise", lambda_bag=10, lambda_edge=10).infer(supervision, graph, nothing)
    assert not oscillating.converged
    calm = LLPBP(factor="pairwise", lambda_bag=0.05, lambda_edge=0.3).infer(supervision, graph, nothing)
    same = LLPBP(lambda_bag=0.05, lambda_edge=0.3).infer(supervision, graph, nothing)
    assert calm.converged
    torch.testing.assert_close(calm.probability, same.probability, rtol=0, atol=5e-3)


def test_without_a_graph_it_is_the_exact_posterior_of_each_bag() -> None:
    """num_neighbors=0 and evidence: the E step of GLWS."""
    labels = torch.tensor([1, 0, 0, 1, 1, 0])
    log_probs = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    found = LLPBP(num_neighbors=0).infer(in_bags(labels, 3), NO_GRAPH, log_probs).probability
    odds = (log_probs[:, 1] - log_probs[:, 0]).double()
    expected = torch.cat([bag_posterior(odds[:3], 1), bag_posterior(odds[3:], 2)])
    torch.testing.assert_close(found[:, 1], expected)


def test_true_labels_are_evidence_and_noisy_ones_are_not() -> None:
    labels = torch.tensor([1, 0, 0, 0])
    supervision = in_bags(labels, 4)
    candidates = supervision.candidates.clone()
    candidates[1, 1] = False  # sample 1 is certainly 0
    certain = LLPBP(num_neighbors=0).infer(replace(supervision, candidates=candidates), NO_GRAPH, torch.zeros(4, 2))
    torch.testing.assert_close(certain.probability[:, 1], torch.tensor([1 / 3, 0, 1 / 3, 1 / 3]).double())
    noisy = replace(supervision, candidates=candidates, noisy=torch.tensor([False, True, False, False]))
    even = LLPBP(num_neighbors=0).infer(noisy, NO_GRAPH, torch.zeros(4, 2))
    torch.testing.assert_close(even.probability[:, 1], torch.full((4,), 0.25).double())
    with pytest.raises(ValueError, match="Bag 0 contradicts itself"):
        LLPBP().infer(supervised_bag(), NO_GRAPH, torch.zeros(4, 2))


def supervised_bag() -> Supervision:
    """Two samples have the label 1, one is counted."""
    candidates = torch.ones(4, 2, dtype=torch.bool)
    candidates[:2, 0] = False
    return replace(in_bags(torch.tensor([1, 0, 0, 0]), 4), candidates=candidates)


def test_two_classes_may_be_inferred_as_several() -> None:
    """The third class is never counted: the couplings are those of two classes."""
    x, labels = gaussians(64)
    graph = neighbor_graph(x)
    two = LLPBP().infer(in_bags(labels, 8), graph, torch.zeros(64, 2)).probability
    three = LLPBP().infer(in_bags(labels, 8, 3), graph, torch.zeros(64, 3)).probability
    torch.testing.assert_close(three[:, :2], two, rtol=0, atol=1e-4)
    assert three[:, 2].abs().max() == 0


def test_sure_evidence_does_not_outvote_an_exact_count() -> None:
    """All four look like ones by 60 to 90; one is counted: the surest."""
    log_probs = torch.tensor([[0.0, 90.0], [0, 80], [0, 70], [0, 60]])
    found = LLPBP(num_neighbors=0).infer(in_bags(torch.tensor([1, 0, 0, 0]), 4), NO_GRAPH, log_probs)
    torch.testing.assert_close(found.probability[:, 1], torch.tensor([1, 0, 0, 0]).double(), rtol=0, atol=1e-4)


def test_a_run_that_ends_before_the_last_stage_is_refused() -> None:
    LLPBP(num_stages=3, stage_rounds=10).check_rounds(21)
    with pytest.raises(ValueError, match=r"`num_rounds` \(=20\) ends before the last of `method.num_stages` \(=3\)"):
        LLPBP(num_stages=3, stage_rounds=10).check_rounds(20)


# -------------------------------------------------------------------------------------------------------------- labels


def test_rules() -> None:
    p = torch.tensor([0.9, 0.6, 0.55, 0.1, 0.3, 0.2, 0.8])
    beliefs = torch.stack([1 - p, p], 1)
    supervision = replace(
        in_bags(torch.tensor([0, 0, 1, 1, 1, 0, 0]), 3), bag=torch.tensor([0, 0, 0, 1, 1, 1, -1]),
        bag_counts=torch.tensor([[2, 1], [1, 2]]),
    )  # fmt: skip
    assert LLPBP().label(beliefs, supervision).tolist() == [1, 1, 1, 0, 0, 0, 1]
    assert LLPBP(threshold=0.85).label(beliefs, supervision).tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert LLPBP(rule="top_count").label(beliefs, supervision).tolist() == [1, 0, 0, 0, 1, 1, 1]


def test_top_count_in_bags_of_any_order() -> None:
    bag = torch.tensor([2, 0, 2, 1, 0, 2, -1])
    chosen = top_count_labels(
        torch.tensor([0.3, 0.2, 0.9, 0.1, 0.4, 0.5, 0.7]), bag, torch.tensor([1, 0, 2]), torch.ones(7, dtype=torch.bool)
    )
    assert chosen.tolist() == [False, False, True, False, True, True, True]


def survey(supervision: Supervision, x: Tensor, memory: dict[str, Tensor], calls: list[tuple[str, ...]]) -> Survey:
    def predict(*arguments: str) -> Tensor:
        calls.append(arguments)
        if arguments[-1] == "embed":
            return x
        return torch.stack([torch.zeros(len(x)), 8 * (x[:, 0] > 0)], 1)

    return Survey(predict, supervision, memory, lambda: x.view(*x.shape, 1, 1))


def test_beliefs_are_made_once_a_stage_of_inputs_and_then_of_embeddings() -> None:
    x, labels = gaussians(64)
    supervision, method = in_bags(labels, 8), LLPBP()
    calls: list[tuple[str, ...]] = []
    memory = empty_memory(supervision.candidates)
    first = method.prepare(survey(supervision, x, memory, calls), stage=0)
    assert calls == []
    assert first.memory is not None
    expected = belief(method, x, supervision)
    torch.testing.assert_close(first.memory["belief"], expected.float())
    assert first.pseudo is not None
    assert first.pseudo.label.tolist() == (expected[:, 1] >= 0.5).long().tolist()
    assert first.metrics["belief/converged"].tolist() == [1, 1]
    assert float(first.metrics["belief/bag_residual"][0]) < 1e-3
    assert first.pairs is not None
    assert len(first.pairs) > 64
    again = method.prepare(survey(supervision, -x, first.memory, calls), stage=0)
    assert torch.equal(again.targets["target"], first.targets["target"])
    assert not again.metrics
    later = method.prepare(survey(supervision, -x, first.memory, calls), stage=1)
    assert calls == [("previous", "clean", "embed")]
    assert later.memory is not None
    assert int(later.memory["stage"]) == 1


@pytest.mark.parametrize(
    ("evidence", "asked"), [("previous", [[], [("previous", "clean")]]), ("current", [[("global", "clean")]] * 2)]
)
def test_evidence_of_models(evidence: str, asked: list[list[tuple[str, str]]]) -> None:
    """Alone in a bag of unknown use it decides; evidence_weight=0 takes it away."""
    x, labels = gaussians(32)
    supervision = in_bags(labels, 16)
    for stage in (0, 1):
        calls: list[tuple[str, ...]] = []
        method = LLPBP(evidence=evidence, num_neighbors=0)
        found = method.prepare(survey(supervision, x, empty_memory(supervision.candidates), calls), stage)
        assert [call for call in calls if call[-1] != "embed"] == asked[stage]
        assert found.memory is not None
        spread = float(found.memory["belief"][:, 1].std())
        without = replace(method, evidence_weight=0.0)
        other = without.prepare(survey(supervision, x, empty_memory(supervision.candidates), []), stage)
        assert other.memory is not None
        assert (spread > float(other.memory["belief"][:, 1].std()) + 0.1) == bool(asked[stage])


def test_current_evidence_keeps_the_graph_of_a_stage() -> None:
    """Other features later in the stage change nothing; the next stage has a graph of its own."""
    x, labels = gaussians(48)
    supervision, method = in_bags(labels, 8), LLPBP(evidence="current")
    memory = empty_memory(supervision.candidates)
    first = method.prepare(survey(supervision, x, memory, []), stage=0)
    assert first.memory is not None
    kept = method.recipe(task(2)).memory.keep(first.memory, [])
    assert torch.equal(kept["edges"], neighbor_graph(x, 5).edges)
    moved = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    again = method.prepare(survey(supervision, moved, {**memory, **kept}, []), stage=0)
    assert again.pairs is not None
    assert torch.equal(again.pairs, kept["edges"])
    later = method.prepare(survey(supervision, moved, {**memory, **kept}, []), stage=1)
    assert later.pairs is not None
    assert later.pairs.shape != kept["edges"].shape or not torch.equal(later.pairs, kept["edges"])
    assert set(LLPBP().recipe(task(2)).memory.keep(first.memory, [])) == {"belief", "stage"}


def test_an_untrained_model_is_no_evidence() -> None:
    """Rounds 1 and 11 begin stages: there the global model is not asked."""
    x, labels = gaussians(32)
    supervision, method = in_bags(labels, 8), LLPBP(evidence="current", num_neighbors=0)
    asked = {}
    for round_number in (1, 2, 11, 12):
        calls: list[tuple[str, ...]] = []
        prepare = method.recipe(task(2)).phases(round_number)[0].prepare
        assert prepare is not None
        prepare(survey(supervision, x, empty_memory(supervision.candidates), calls))
        asked[round_number] = ("global", "clean") in calls
    assert asked == {1: False, 2: True, 11: False, 12: True}


def test_what_nothing_reaches_is_not_learnt() -> None:
    """A bag half of ones learns that; samples in no bag and without a neighbour in one learn nothing."""
    supervision = in_bags(torch.tensor([1, 0, 0, 0, 0, 1]), 2)
    supervision = replace(supervision, bag=torch.tensor([0, 0, 1, 1, -1, -1]), bag_counts=supervision.bag_counts[:2])
    memory = empty_memory(supervision.candidates)
    prepared = LLPBP(num_neighbors=0, rule="soft").prepare(survey(supervision, torch.ones(6, 2), memory, []), 0)
    assert prepared.targets["target"].tolist() == [[0.5, 0.5]] * 2 + [[1, 0]] * 2 + [[0, 0]] * 2
    assert prepared.pseudo is not None
    assert prepared.pseudo.keep.tolist() == [True] * 4 + [False] * 2


# ---------------------------------------------------------------------------------------------------------------- loss


def test_loss_is_cross_entropy_to_the_labels_plus_that_of_mean_embeddings() -> None:
    """By hand: a bag of two and one of one; the second sample is not learnt."""
    torch.manual_seed(0)
    model = BagHead(Mlp((1, 1, 1), 2, (3,)), 4)
    target = torch.tensor([[0.0, 1], [0, 0], [1, 0]])
    batch = make_batch(2, torch.tensor([0, 0, 0]), targets=None)
    part = batch.labeled._replace(
        targets={"target": target}, members=torch.tensor([[0, 1], [2, -1]]), bag_counts=torch.tensor([[1, 1], [0, 0]])
    )
    step = LLPBP(lambda_aggregate=0.3).loss(model, {}, batch._replace(labeled=part))
    images = part.views["weak"]
    logits = model(images)
    each = cross_entropy(logits, torch.tensor([1, 0, 0]), reduction="none")
    mean = model.net(images, "embed")[:2].mean(0, keepdim=True)
    shares = model.bag_output(torch.relu(model.bag_hidden(mean))).log_softmax(1)[0]
    expected = (each[0] + each[2]) / 2 - 0.3 * (shares[0] + shares[1]) / 2
    torch.testing.assert_close(step.loss, expected)
    assert step.examples == 2


def test_loss_by_hand() -> None:
    """p(label) = .8 and .75, a sample between that is not learnt: (-ln .8 - ln .75) / 2 = .255413.

    A bag output that is even at a share of .5 adds .3 ln 2 = .207944: .463357.
    """
    batch = make_batch(2, torch.tensor([0, 0, 0]), targets=None)
    part = batch.labeled._replace(
        targets={"target": torch.tensor([[0.0, 1], [0, 0], [1, 0]])},
        members=torch.tensor([[0, 1], [2, -1]]),
        bag_counts=torch.tensor([[1, 1], [0, 0]]),
    )
    logits = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.75, 0.25]]).log()

    def student(values: Tensor, output: str = "all") -> Tensor:
        return {"embed": torch.ones(3, 4), "classify": logits, "bags": torch.zeros(len(values), 2)}[output]

    step = LLPBP(lambda_aggregate=0.3).loss(student, {}, batch._replace(labeled=part))
    assert step.loss.item() == pytest.approx(0.463357, abs=1e-6)


def test_without_weight_the_bag_output_is_not_there_and_the_trunk_moves_as_without_it() -> None:
    """Check 14: lambda_aggregate = 0."""
    headed = LLPBP(head_hidden=32).recipe(task()).network
    module = headed.wrap(lambda place: Mlp((1, 1, 1), 2, (3,)), 0)
    assert isinstance(module, BagHead)
    assert module.bag_hidden.out_features == 32
    assert headed.embeds
    assert LLPBP(lambda_aggregate=0).recipe(task()).network == one_network_with_embeddings
    assert LLPBP(lambda_aggregate=0, num_stages=1).recipe(task()).network == one_network
    torch.manual_seed(0)
    net = Mlp((1, 1, 1), 2, (3,))
    batch = make_batch(2, torch.tensor([0, 1, 0]))
    part = batch.labeled._replace(
        targets={"target": torch.eye(2)[[1, 0, 1]]},
        members=torch.arange(3)[:, None],
        bag_counts=torch.eye(2).long()[[0, 1, 0]],
    )
    batch = batch._replace(labeled=part)
    plain = torch.autograd.grad(LLPBP(lambda_aggregate=0).loss(net, {}, batch).loss, list(net.parameters()))
    loss = cross_entropy(net(part.views["weak"]), torch.tensor([1, 0, 1]))
    for found, expected in zip(plain, torch.autograd.grad(loss, list(net.parameters())), strict=True):
        torch.testing.assert_close(found, expected)


# -------------------------------------------------------------------------------------------------------------- rounds


def test_stages() -> None:
    recipe = LLPBP(num_stages=3, stage_rounds=4).recipe(task())
    assert [recipe.place(r).number for r in range(1, 14)] == [0] * 4 + [1] * 4 + [2] * 5
    assert [r for r in range(1, 30) if recipe.begins(r)] == [5, 9]
    assert [stage.name for stage in recipe.stages] == ["stage 1 of 3", "stage 2 of 3", "stage 3 of 3"]
    assert {stage.start for stage in recipe.stages} == {Start.FRESH}
    assert recipe.phases(4)[0].teachers == ()
    assert recipe.phases(5)[0].teachers == ("previous",)
    current = LLPBP(evidence="current").recipe(task())
    assert [current.phases(r)[0].teachers for r in (1, 11)] == [("global",), ("previous", "global")]


def test_it_learns_bags_sets_and_true_labels_and_draws_samples_in_no_bag() -> None:
    recipe = LLPBP().recipe(task())
    assert recipe.uses == LabelKinds.TRUE | LabelKinds.SETS | LabelKinds.BAGS | LabelKinds.AT_SERVER
    assert recipe.phases(1)[0].draw == ByBag(labeled=("weak",), singles=True)
    assert recipe.memory.start is empty_memory


def transform(features: int) -> ImageTransform:
    return ImageTransform(torch.zeros(features, 1, 1), torch.ones(features, 1, 1), AugmentConfig(crop_padding=0), False)


def test_a_client_learns_its_labels_from_counts() -> None:
    """Both stages; the second no worse than the first but for .02, and the loss on bags falls. Check 14."""
    x, labels = gaussians(512)
    supervision = in_bags(labels, 8)
    data = ClientData((x * 16 + 128).clamp(0, 255).to(torch.uint8).view(512, 8, 1, 1), supervision)
    recipe = LLPBP(stage_rounds=8).recipe(task(2))
    torch.manual_seed(0)
    modules = [BagHead(Mlp((8, 1, 1), 2, (16,)), 8) for _ in range(3)]
    trainer = Trainer(modules[0], modules[1], transform(8), TrainingConfig(lr=0.5, local_steps=20, batch_size=64))
    fresh = {name: value.clone() for name, value in modules[2].state_dict().items()}
    auc, loss, kept, before = [], [], {}, {}
    for first in (1, 9):
        state = fresh
        for round_number in range(first, first + 8):
            update = train_client(recipe, trainer, state, data, round_number, round_number, kept, before)
            state, kept = update.parts["model"].state, update.kept
            total, count = update.sums["train/loss_aggregate"]
            loss.append(total / count)
        before = {"previous": state}
        modules[1].load_state_dict(state)
        logits = modules[1](transform(8).normalize(data.images))
        auc.append(roc_auc_score(labels, (logits[:, 1] - logits[:, 0]).detach()))
    assert auc[0] > 0.95
    assert auc[1] > auc[0] - 0.02
    assert loss[7] < loss[0] - 0.02


def test_a_step_draws_whole_bags() -> None:
    """Every batch has the samples of its bags, in their places, with their counts, and each bag once an epoch."""
    x, labels = gaussians(60)
    supervision = in_bags(labels, 5)
    data = ClientData((x * 16 + 128).clamp(0, 255).to(torch.uint8).view(60, 8, 1, 1), supervision)
    seen: list[int] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 2)

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(images.flatten(1))

    def spy(logits: Tensor, batch: Batch) -> Tensor:
        part = batch.labeled
        for members, counts in zip(part.members, part.bag_counts, strict=True):
            rows = part.rows[members[members >= 0]]
            (number,) = supervision.bag[rows].unique().tolist()
            assert len(rows) == 5
            assert torch.bincount(labels[rows], minlength=2).tolist() == counts.tolist()
            seen.append(number)
        assert len(part.members) == 4
        return dllp_bag_loss(logits, batch)

    config = TrainingConfig(local_epochs=2, local_steps=None, batch_size=20)
    trainer = Trainer(Watching(), Watching(), transform(8), config)
    update = train_client(bag_recipe(of_bags(spy)), trainer, Watching().state_dict(), data, 1, 0)
    assert sorted(seen) == sorted(list(range(12)) * 2)
    assert update.forward == update.backward == 120
    assert update.parts["model"].weight == 120


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": "pairwise"}, r"`method.lambda_bag` \(=inf\) must be finite for method.factor=pairwise"),
        ({"factor": "pairs"}, r"`method.factor` \(=pairs\) must be one of"),
        ({"rule": "map"}, r"`method.rule` \(=map\)"),
        ({"evidence": "yes"}, r"`method.evidence` \(=yes\)"),
        ({"backend": "annoy"}, r"`method.backend` \(=annoy\)"),
        ({"num_stages": 0}, r"`method.num_stages` \(=0\)"),
        ({"stage_rounds": 0}, r"`method.stage_rounds` \(=0\)"),
        ({"num_neighbors": -1}, r"`method.num_neighbors` \(=-1\)"),
        ({"lambda_bag": -1.0}, r"`method.lambda_bag` \(=-1.0\)"),
        ({"lambda_edge": math.inf}, r"`method.lambda_edge` \(=inf\) must be a finite number"),
        ({"max_distance": 0.0}, r"`method.max_distance` \(=0.0\)"),
        ({"length_scale": 0.0}, r"`method.length_scale` \(=0.0\)"),
        ({"damping": 1.0}, r"`method.damping` \(=1.0\)"),
        ({"threshold": 1.0}, r"`method.threshold` \(=1.0\)"),
        ({"evidence": "previous", "num_stages": 1}, r"`method.evidence` \(=previous\) needs method.num_stages"),
    ],
)
def test_bad_fields_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLPBP(**changes)  # type: ignore[arg-type]


def test_centered_edges_say_nothing_where_all_bags_have_one_share() -> None:
    """Whatever the graph, beliefs stay at the share; the paper's coupling moves those with many neighbours to zero."""
    x, _ = gaussians(64)
    graph, supervision = neighbor_graph(x), in_bags(torch.tensor([1, 0, 0, 0]).repeat(16), 4)
    quarter = torch.full((64,), 0.25).double()
    found = LLPBP(centered=True, max_iterations=500).infer(supervision, graph, torch.zeros(64, 2))
    torch.testing.assert_close(found.probability[:, 1], quarter, rtol=0, atol=1e-3)
    plain = LLPBP(max_iterations=500).infer(supervision, graph, torch.zeros(64, 2)).probability[:, 1]
    assert float((plain - quarter).abs().max()) > 0.05
    degree = torch.bincount(graph.edges.flatten(), minlength=64).double()
    assert float(torch.corrcoef(torch.stack([degree, plain]))[0, 1]) < -0.3


def test_centering_is_the_field_of_a_factor_with_the_given_marginals() -> None:
    """By enumeration of two labels of log-odds c + h each."""
    coupling, c = torch.tensor([0.0, 0.3, 2.0]).double(), math.log(0.2 / 0.8)
    x = (c + centering(coupling, c)).exp()
    differ = (-coupling).exp() * x
    marginal = (x**2 + differ) / (1 + 2 * differ + x**2)
    torch.testing.assert_close(marginal, torch.full((3,), 0.2).double())


@pytest.mark.parametrize(
    "changes", [{"rule": "top_count"}, {"centered": True}, {"factor": "pairwise", "lambda_bag": 1.0}]
)
def test_what_is_for_two_classes_is_refused_for_more(changes: dict[str, object]) -> None:
    LLPBP().recipe(task(3))
    LLPBP(lambda_bag=2.0).recipe(task(3))
    method = LLPBP(**changes)  # type: ignore[arg-type]
    method.recipe(task(2))
    with pytest.raises(ValueError, match="with 3 classes rule=top_count, factor=pairwise and centered"):
        method.recipe(task(3))


def test_noisy_counts_need_a_finite_weight() -> None:
    with pytest.raises(ValueError, match=r"`method.lambda_bag` \(=inf\) .* e.g. method.lambda_bag=1\."):
        LLPBP().recipe(task(2, noisy_counts=True))
    LLPBP(lambda_bag=1.0).recipe(task(2, noisy_counts=True))


def test_marginals_are_those_of_the_inference() -> None:
    """lambda_bag, lambda_edge, damping and iterations are handed on."""
    x, labels = gaussians(32)
    supervision, graph = in_bags(labels, 8), neighbor_graph(x)
    method = LLPBP(lambda_bag=0.5, lambda_edge=0.7, damping=0.2, max_iterations=3)
    bag, ones = supervision.bag, supervision.bag_counts[:, 1]
    direct = marginals(
        torch.zeros(32).double(), bag, ones, graph.edges, graph.weight.double(), 0.5, 0.7, damping=0.2, max_iterations=3
    )
    torch.testing.assert_close(
        method.infer(supervision, graph, torch.zeros(32, 2)).probability[:, 1], direct.probability
    )
