"""DP-SSL: the arithmetic of growing functions, slow derivations of a batch, stages, federated EM through the hooks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlabel.data.labels.supervision import Supervision, reveal_labels
from fedlabel.inference.head_assignment import assign_classes, class_losses, random_classes
from fedlabel.inference.label_model import LabelModel, client_prior
from fedlabel.learning.client import ClientData, ClientUpdate, Trainer, train_client
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods.batch import Batch, Prepared, State, StateDict, Step, Survey
from fedlabel.methods.dp_ssl import DPSSL, functions_loss
from fedlabel.methods.losses import cross_entropy_on_labels
from fedlabel.methods.recipe import BySample, LabelKinds, Method, Phase, Recipe, Stage, Start, Task
from fedlabel.models.labeling_heads import LabelingHeads
from fedlabel.models.nets import Mlp
from fedlabel.models.wrap import one_network
from tests.inference.test_head_assignment import LOSSES, sets_of
from tests.inference.test_label_model import simulate, skewed
from tests.methods.batches import certain_part
from tests.methods.recipes import task
from tests.methods.rounds import TRANSFORM
from tests.methods.tables import CLASSES, NOTHING, Table, client, net, softmax

LATE = 1000
"""A round of the end model."""


def recipe_of(method: DPSSL, classes: int = CLASSES) -> Recipe:
    """The recipe for a federation whose written functions, if there are to be some, vote for every class."""
    written = 0 if method.grown else method.num_functions
    return method.recipe(task(classes, votes=((1,) * classes,) * written))


def phase_of(method: DPSSL, round_number: int) -> Phase:
    (phase,) = recipe_of(method).phases(round_number)
    return phase


def summed(statistics: Sequence[State]) -> State:
    return {name: torch.stack([each[name] for each in statistics]).sum(0) for name in statistics[0]}


# ------------------------------------------------------------------------------------------------- a label of the heads


def test_all_heads_for_each_class_are_ordinary_classifiers() -> None:
    """Check 7, rho = K: the sum over heads of the cross-entropy, and abstaining is no target."""
    sets = torch.from_numpy(assign_classes(np.random.default_rng(0).random((4, 3)), 4))
    assert sets.all()
    logits = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 1, 2, 2, 0])
    loss = functions_loss(logits.log_softmax(-1), labels, sets, torch.full((4,), 1e6)).sum()
    expected = cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(4), reduction="none").sum() / 4
    torch.testing.assert_close(loss, expected)


def test_losers_get_no_gradient_where_abstaining_weighs_nothing() -> None:
    """Check 7 as a loss: heads whose -log p(class) is LOSSES, item i of class i, mean over three heads."""
    probs = torch.from_numpy(np.exp(-LOSSES)).float()
    each = torch.zeros(2, 3, 3)
    for item in range(2):  # p(class of the item) as given; the rest is shared by the other class and abstaining
        each[item] = ((1 - probs[:, item]) / 2)[:, None]
        each[item, :, item] = probs[:, item]
    logits = each.log().requires_grad_()
    labels, sets = torch.tensor([0, 1]), sets_of("10", "01", "00")
    loss = functions_loss(logits.log_softmax(-1), labels, sets, torch.zeros(3)).sum()
    assert 3 * loss.item() == pytest.approx(0.5, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    moved = gradient.abs().sum(-1) > 0
    assert moved.tolist() == [[True, False, False], [False, True, False]]
    both = functions_loss(logits.log_softmax(-1), labels, sets_of("10", "01", "11"), torch.zeros(3)).sum()
    assert 3 * both.item() == pytest.approx(1.6, abs=1e-6)


def test_a_label_outside_the_set_teaches_to_abstain_only() -> None:
    """Check 8: p = (.5, .3, .2), the last is to abstain; of class 1 outside {0} 2 (-ln .2), gradient 2 (p - e)."""
    logits = torch.tensor([[[0.5, 0.3, 0.2]]]).log().requires_grad_()
    loss = functions_loss(logits.log_softmax(-1), torch.tensor([1]), sets_of("10"), torch.tensor([2.0])).sum()
    assert loss.item() == pytest.approx(-2 * math.log(0.2), abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.tensor([[[1.0, 0.6, -1.6]]]))
    inside = functions_loss(logits.log_softmax(-1), torch.tensor([0]), sets_of("10"), torch.tensor([2.0])).sum()
    assert inside.item() == pytest.approx(-math.log(0.5), abs=1e-6)


# ------------------------------------------------------------------------------------------------- a batch of functions


class Heads:
    """Logits (n, K, C + 1) of labelled samples and of the weak and strong views of unlabelled ones."""

    def __init__(self, labeled: Tensor, labels: Tensor, weak: Tensor, strong: Tensor, sets: Tensor) -> None:
        self.labels, self.sets = labels, sets
        self.sizes = [len(labeled), len(weak), len(strong)]
        self.rows = torch.cat([labeled, weak, strong]).clone().requires_grad_()

    def student(self, images: Tensor, part: str) -> Tensor:
        assert part == "heads"
        return self.rows[images.flatten().long()]

    def batch(self) -> Batch:
        ends = np.cumsum(self.sizes)
        rows = [torch.arange(e - n, e).float().view(n, 1, 1, 1) for e, n in zip(ends, self.sizes, strict=True)]
        classes = self.sets.shape[1]
        unknown = torch.ones(self.sizes[1], classes, dtype=torch.bool)
        return Batch(
            labeled=certain_part({"weak": rows[0]}, self.labels[:, None] == torch.arange(classes), {}),
            unlabeled=certain_part({"weak": rows[1], "strong": rows[2]}, unknown, {}),
            mix=certain_part({}, unknown[:0], {}),
            mixing=torch.tensor(1.0),
            memory={"sets": self.sets.float()},
        )

    def gradients(self, step: Step) -> Sequence[Tensor]:
        (gradient,) = torch.autograd.grad(step.loss, self.rows)
        return gradient.split(self.sizes)


def random_heads(seed: int, labeled: int = 4, unlabeled: int = 5) -> Heads:
    generator = torch.Generator().manual_seed(seed)
    tables = [3 * torch.randn(n, 3, 4, generator=generator) for n in (labeled, unlabeled, unlabeled)]
    labels = torch.randint(3, (labeled,), generator=generator)
    return Heads(tables[0], labels, tables[1], tables[2], sets_of("110", "001", "111"))


@pytest.mark.parametrize("abstentions", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_functions_step_per_sample_and_head(seed: int, frozen: bool, abstentions: bool) -> None:
    """Written out: who is right or silent on labels, who is sure of what on weak views, gradients of each logit.

    The weights of abstaining are 2 / 1, 1 / 2, and none where the set has all classes.
    """
    heads = random_heads(seed)
    method = DPSSL(num_functions=3, confidence_threshold=0.8, lambda_u=1.5, learn_abstentions=abstentions)
    step = method.functions_step(heads.student, NOTHING, heads.batch(), frozen)
    labeled, weak, strong = (part.detach() for part in heads.rows.split(heads.sizes))
    weight = [2.0, 0.5, math.nan]
    total, kept = 0.0, 0
    expected = [torch.zeros_like(part) for part in (labeled, weak, strong)]

    def probabilities(logits: Tensor, head: int) -> list[float]:
        allowed = [*heads.sets[head].tolist(), True] if frozen else [True] * 4
        return softmax(torch.where(torch.tensor(allowed), logits, -torch.inf))

    def push(gradient: Tensor, p: list[float], target: int, share: float) -> None:
        for place, value in enumerate(p):
            gradient[place] += share * (value - (place == target))

    for head in range(3):
        for i, label in enumerate(heads.labels.tolist()):
            p, inside = probabilities(labeled[i, head], head), bool(heads.sets[head, label])
            target, share = (label, 1 / 4) if inside else (3, weight[head] / 4)  # 4 samples; summed over heads
            total -= share * math.log(p[target])
            push(expected[0][i, head], p, target, share)
        for i in range(5):
            q, p = probabilities(weak[i, head], head), probabilities(strong[i, head], head)
            if max(q) >= 0.8 and (abstentions or q.index(max(q)) < 3):
                kept += 1
                total -= 1.5 / 5 * math.log(p[q.index(max(q))])
                push(expected[2][i, head], p, q.index(max(q)), 1.5 / 5)
    assert 0 < kept < 15
    assert step.loss.item() == pytest.approx(total, abs=1e-5)
    for found, wanted in zip(heads.gradients(step), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert step.metrics["functions/kept"].tolist() == [kept, 15]


def test_a_head_keeps_a_vote_at_the_threshold_and_counts_what_it_learnt() -> None:
    """q = (.5, .5): kept at .5, dropped above. Abstaining is a vote, too, where that is asked for."""
    even = torch.zeros(1, 1, 2)
    heads = Heads(torch.zeros(0, 1, 2), torch.zeros(0, dtype=torch.int64), even, even, torch.ones(1, 1).bool())
    at = DPSSL(num_functions=1, confidence_threshold=0.5).functions_step(heads.student, NOTHING, heads.batch())
    assert at.loss.item() == pytest.approx(math.log(2))
    assert at.examples == 1
    above = DPSSL(num_functions=1, confidence_threshold=0.51).functions_step(heads.student, NOTHING, heads.batch())
    assert above.loss.item() == 0
    assert above.examples == 0
    silent = torch.tensor([[[0.1, 0.9]]]).log()
    heads = Heads(torch.zeros(0, 1, 2), torch.zeros(0, dtype=torch.int64), silent, even, torch.ones(1, 1).bool())
    method = DPSSL(num_functions=1, confidence_threshold=0.9, learn_abstentions=True)
    step = method.functions_step(heads.student, NOTHING, heads.batch())
    assert step.metrics["functions/abstained"].tolist() == [1, 1]
    assert heads.gradients(step)[2].flatten().tolist() == pytest.approx([0.5, -0.5])
    without = replace(method, learn_abstentions=False).functions_step(heads.student, NOTHING, heads.batch())
    assert without.metrics["functions/abstained"].tolist() == [1, 1]
    assert (without.loss.item(), without.examples.item()) == (0, 0)


# ------------------------------------------------------------------------------------------------------- the end model


def end_step(target: Sequence[float], f: Sequence[float], method: DPSSL | None = None) -> tuple[Step, Table]:
    """The step of one unlabelled sample with this posterior and this prediction on its strong view."""
    table = Table(
        torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), torch.zeros(1, 3), torch.tensor([list(f)]).log()
    )
    posterior = torch.tensor([list(target)], dtype=torch.float32)
    step = (method or DPSSL()).loss(table.student, NOTHING, table.batch(targets={"target": posterior}))
    return step, table


def test_noise_aware_loss_by_hand() -> None:
    """Check 10: -(.75 ln .6 + .2 ln .3 + .05 ln .1) = .7390430, gradient f - p = (-.15, .10, .05)."""
    step, table = end_step((0.75, 0.2, 0.05), (0.6, 0.3, 0.1))
    assert step.loss.item() == pytest.approx(0.7390430, abs=1e-6)
    assert table.gradients(step).strong[0].tolist() == pytest.approx([-0.15, 0.10, 0.05], abs=1e-6)
    assert step.examples == 1
    half, _ = end_step((0.75, 0.2, 0.05), (0.6, 0.3, 0.1), DPSSL(lambda_e=0.5))
    assert half.loss.item() == pytest.approx(0.7390430 / 2, abs=1e-6)


def test_no_gradient_reaches_the_posterior() -> None:
    """Check 10: the target is a constant, whatever made it."""
    target = torch.tensor([[0.75, 0.2, 0.05]], requires_grad=True)
    strong = torch.tensor([[0.6, 0.3, 0.1]]).log().requires_grad_()
    table = Table(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), torch.zeros(1, 3), strong)
    step = DPSSL().loss(table.student, NOTHING, table.batch(targets={"target": target}))
    step.loss.backward()
    assert target.grad is None


def test_a_certain_posterior_is_a_label_and_an_even_one_at_an_even_model_moves_nothing() -> None:
    """Check 10: -ln .6 = .5108256; and a sample whose target is 0 is not learnt."""
    sure, _ = end_step((1, 0, 0), (0.6, 0.3, 0.1))
    assert sure.loss.item() == pytest.approx(0.5108256, abs=1e-6)
    even, table = end_step((1 / 3, 1 / 3, 1 / 3), (1 / 3, 1 / 3, 1 / 3))
    assert table.gradients(even).strong.abs().max() < 1e-7
    left_out, _ = end_step((0, 0, 0), (0.6, 0.3, 0.1))
    assert left_out.loss.item() == 0
    assert left_out.examples == 0


def test_labels_the_posterior_and_consistency_add_up() -> None:
    """One label at p(y) = .5; one sample as above and one that is not learnt: half of .7390430; of the two weak views
    (.96, .02, .02) and (.9, .05, .05) the first is above .95: half of -ln .6 for its strong view, with lambda_c 2."""
    table = Table(
        torch.tensor([[0.25, 0.5, 0.25]]).log(),
        torch.tensor([1]),
        torch.tensor([[0.96, 0.02, 0.02], [0.9, 0.05, 0.05]]).log(),
        torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]]).log(),
    )
    batch = table.batch(targets={"target": torch.tensor([[0.75, 0.2, 0.05], [0, 0, 0]])})
    plain = DPSSL().loss(table.student, NOTHING, batch)
    assert plain.loss.item() == pytest.approx(math.log(2) + 0.7390430 / 2, abs=1e-6)
    assert plain.examples == 2
    both = DPSSL(lambda_c=2.0).loss(table.student, NOTHING, batch)
    assert both.loss.item() == pytest.approx(plain.loss.item() - 2 * math.log(0.6) / 2, abs=1e-6)
    gradients = table.gradients(both)
    assert gradients.weak.abs().sum() == 0
    assert gradients.strong[1].abs().sum() == 0


def end_of(votes: Tensor, **changes: Any) -> DPSSL:
    return DPSSL(functions="written", num_functions=votes.shape[1], **changes)


@dataclass(frozen=True)
class StrongLabels(Method):
    """Cross-entropy of labels on strong views."""

    def recipe(self, task: Task) -> Recipe:
        phase = Phase("end model", self.of_strong, draw=BySample(("strong",)))
        return Recipe((Stage((phase,)),), uses=LabelKinds.TRUE)

    def of_strong(self, student: Any, teachers: Any, batch: Batch) -> Step:
        part = batch.labeled
        return cross_entropy_on_labels(student, part._replace(views={"weak": part.views["strong"]}))


def train(recipe: Recipe, known: Supervision, round_number: int, shared: State) -> ClientUpdate:
    """A round on `client`'s images, from `net()`; a step sees all samples."""
    data = ClientData(client().images[: len(known.noisy)], known)
    trainer = Trainer(net(5), net(6), TRANSFORM, TrainingConfig(lr=0.2, batch_size=1000, local_steps=4))
    return train_client(recipe, trainer, net().state_dict(), data, round_number, 7, shared)


def voted(votes: Sequence[Sequence[int]] | Tensor, labels: Tensor | None = None, classes: int = CLASSES) -> Supervision:
    """Votes of written functions, and labels where they are not -1."""
    votes = torch.as_tensor(votes)
    unknown = torch.full((len(votes),), -1) if labels is None else labels
    record = reveal_labels(unknown.clamp_min(0), unknown >= 0, classes)
    return replace(record, votes=votes)


def test_an_end_model_of_true_labels_is_supervised_training() -> None:
    """Check 11: a function that says the truth, up to the order of additions."""
    truth = torch.randint(CLASSES, (30,), generator=torch.Generator().manual_seed(3))
    method = end_of(truth[:, None], label_model_rounds=1, hard=True)
    recipe = recipe_of(method)
    first = train(recipe, voted(truth[:, None]), 1, recipe.shared.start())
    shared = recipe.shared.update(recipe.shared.start(), first.statistics)
    learnt = train(recipe, voted(truth[:, None]), 2, shared)
    expected = train(StrongLabels().recipe(task()), reveal_labels(truth, torch.ones(30).bool(), CLASSES), 2, {})
    for name, value in expected.parts["model"].state.items():
        torch.testing.assert_close(learnt.parts["model"].state[name], value, atol=1e-6, rtol=1e-5)
        assert not torch.equal(value, net().state_dict()[name])
    assert learnt.parts["model"].weight == expected.parts["model"].weight == 120


# --------------------------------------------------------------------------------------------------------------- stages


def stages_of(method: DPSSL, rounds: int) -> list[str]:
    recipe = recipe_of(method)
    return [recipe.place(r).stage.name for r in range(1, rounds + 1)]


def test_stages_follow_the_rounds() -> None:
    method = DPSSL(functions_rounds=5, assignment_rounds=2, label_model_rounds=3)
    assert stages_of(method, 10) == ["functions"] * 5 + ["label model"] * 3 + ["end model"] * 2
    assert [r for r in range(1, 30) if recipe_of(method).begins(r)] == [6]
    phases = [phase_of(method, r) for r in range(1, 10)]
    assert [p.name for p in phases] == ["functions"] * 5 + ["label model"] * 3 + ["end model"]
    assert [p.steps for p in phases] == [0, None, None, None, None, 0, 0, 0, None]
    assert [p.teachers for p in phases] == [("global",)] * 2 + [()] * 3 + [("previous",)] * 4
    assert [p.prepare is not None for p in phases] == [True] * 2 + [False] * 3 + [True] * 4
    drawn = DPSSL(assignment="random", functions_rounds=2, label_model_rounds=1)
    assert [phase_of(drawn, r).steps for r in (1, 2, 3, 4)] == [None, None, 0, None]
    assert all(phase_of(drawn, r).prepare is None for r in (1, 2))


def test_written_functions_begin_with_the_label_model() -> None:
    method = DPSSL(functions="written", label_model_rounds=2, lambda_c=0.5)
    assert stages_of(method, 4) == ["label model"] * 2 + ["end model"] * 2
    recipe = recipe_of(method)
    assert not any(recipe.begins(r) for r in range(50))
    assert phase_of(method, 1).teachers == ()
    assert phase_of(method, 3).draw == BySample(("weak",), ("weak", "strong"))
    assert (recipe.network, recipe.place(1).stage.averaging) == (one_network, 0.0)
    grown = recipe_of(DPSSL())
    assert grown.network.embeds
    with torch.random.fork_rng():
        heads = grown.network.wrap(lambda place: Mlp((1, 2, 2), 3, (4,)), 0)
    assert isinstance(heads, LabelingHeads)
    assert heads(torch.zeros(2, 1, 2, 2), "heads").shape == (2, 50, 4)
    assert recipe.num_functions == grown.num_functions == 50
    assert [grown.place(r).stage.averaging for r in (1, 24, 25)] == [0.5, 0.5, 0.0]
    assert [grown.place(r).stage.final for r in (1, 24, 30, 31)] == [False, False, False, True]


def test_the_kinds_of_label_that_it_learns_from() -> None:
    """None at the server alone: its stages begin at the clients."""
    labels = LabelKinds.TRUE | LabelKinds.NOISY
    assert recipe_of(DPSSL()).uses == labels
    assert recipe_of(DPSSL(functions="written")).uses == labels | LabelKinds.VOTES


def test_what_each_stage_trains() -> None:
    names = [name for name, _ in LabelingHeads(Mlp((1, 2, 2), 3, (4,)), 5).named_parameters()]
    method = DPSSL(functions_rounds=5)
    first, last = phase_of(method, 1).trains, phase_of(method, LATE).trains
    assert first is not None
    assert last is not None
    own = {"net.output.weight", "net.output.bias"}
    assert set(names) - set(first(names)) == own
    assert set(names) - set(last(names)) == {"heads.weight", "heads.bias"}


def test_the_end_model_starts_fresh_or_from_the_functions_trunk() -> None:
    old, new = (LabelingHeads(Mlp((1, 2, 2), 3, (4,)), 2).state_dict() for _ in range(2))
    assert recipe_of(DPSSL()).stages[1].start is Start.FRESH
    start = recipe_of(DPSSL(end_start="warm")).stages[1].start
    assert callable(start)
    warm = start(old, new)
    assert list(warm) == list(new)
    for name, value in warm.items():
        assert torch.equal(value, (new if name.startswith("net.output.") else old)[name])


def test_rounds_must_reach_the_end_model() -> None:
    DPSSL(functions_rounds=5, label_model_rounds=3).check_rounds(9)
    with pytest.raises(ValueError, match=r"`num_rounds` \(=8\) ends before .* \(=5\) .* \(=3\): take at least 9"):
        DPSSL(functions_rounds=5, label_model_rounds=3).check_rounds(8)
    DPSSL(functions="written", label_model_rounds=3).check_rounds(4)
    with pytest.raises(ValueError, match=r"`num_rounds` \(=3\) .*`method.functions_rounds` \(=0\) .* at least 4"):
        DPSSL(functions="written", label_model_rounds=3).check_rounds(3)


def test_what_is_evaluated_in_each_stage() -> None:
    """One head of {0}, one of {1}; the model's heads vote 0, the average's 1, and its own output says 2."""

    def saying(vote: int) -> Any:
        def model(images: Tensor, part: str = "all") -> Tensor:
            if part == "all":
                return torch.tensor([[0.0, 0.0, 9.0]]).expand(len(images), 3)
            logits = torch.zeros(len(images), 3, 4)
            logits[..., 3] = 1.0
            logits[:, vote, vote] = 5.0
            return logits

        return model

    method = DPSSL(num_functions=3, heads_per_class=1, functions_rounds=3, assignment_rounds=1, label_model_rounds=2)
    models = {"model": saying(0), "average": saying(1)}
    recipe = recipe_of(method)
    shared = {**recipe.shared.start(), "sets": torch.eye(3)}
    images = torch.zeros(2, 1, 1, 1)

    def class_in(round_number: int, given: Mapping[str, Any]) -> list[int]:
        state = {**shared, "rounds": torch.tensor(float(round_number))}
        predict = recipe.place(round_number).stage.predict(given, state)
        assert predict is not None
        logits = predict(images)
        assert logits.isfinite().all()
        return logits.argmax(1).tolist()

    assert class_in(3, models) == [1, 1]
    assert class_in(3, {"model": saying(0)}) == [0, 0]
    assert class_in(5, {**models, "previous": saying(0)}) == [0, 0]
    assert class_in(6, {**models, "previous": saying(0)}) == [2, 2]
    tables = torch.zeros(3, 4, 3)
    tables[:, 3], tables[0, 0], tables[0, 3] = 1.0, torch.tensor([0.1, 0.1, 0.8]), torch.tensor([0.9, 0.9, 0.2])
    shared |= {"fitted": torch.tensor(1.0), "tables": tables}  # head 0 is known to say 0 where it is 2
    assert class_in(5, {**models, "previous": saying(0)}) == [2, 2]
    written = DPSSL(functions="written", num_functions=3, label_model_rounds=2)
    assert recipe_of(written).stages[0].predict({"model": models["model"]}, shared) is None


# ------------------------------------------------------------------------------------------------------ what is summed


def surveyed(logits: Tensor, known: Supervision, memory: State) -> Survey:
    """A client whose heads have these logits (n, K, C + 1), whichever model is asked."""

    def predict(teacher: str, view: str, part: str) -> Tensor:
        assert (view, part) == ("clean", "heads")
        return logits

    return Survey(predict, known, memory)


def certainly(votes: Tensor, classes: int) -> Tensor:
    """Logits (n, K, C + 1) of heads that vote so."""
    symbol = torch.where(votes >= 0, votes, classes)
    return 9.0 * torch.nn.functional.one_hot(symbol, classes + 1)


def memory_of(recipe: Recipe, shared: State) -> State:
    return {**recipe.memory.start(torch.ones(1, shared["sets"].shape[1]).bool()), **shared}


def test_measured_losses_of_clients_sum_to_those_of_the_union_and_classes_follow_them() -> None:
    """Clients of 20, 1 and 9 samples, the second without a label; then half of the old sums and all of the new."""
    method = DPSSL(num_functions=6, heads_per_class=3, functions_rounds=5)
    recipe = recipe_of(method)
    shared = recipe.shared.start()
    old_losses, old_samples = torch.zeros(6, 3), torch.zeros(3)
    for round_number in (1, 2):
        generator = torch.Generator().manual_seed(round_number)
        logits = 2 * torch.randn(30, 6, 4, generator=generator)
        labels = torch.randint(3, (30,), generator=generator)
        mask = torch.rand(30, generator=generator) < 0.5
        mask[20] = False
        statistics = []
        for rows in torch.arange(30).split([20, 1, 9]):
            known = reveal_labels(labels[rows], mask[rows], 3)
            prepared = prepare(recipe, shared, logits[rows], known)
            assert prepared.memory is not None
            statistics.append(recipe.shared.statistics(prepared.memory))
        assert statistics[0].keys() == {"head_losses", "class_samples"}
        assert statistics[1]["head_losses"].abs().sum() == 0
        union = class_losses(logits, torch.where(mask, labels, -1))
        total = summed(statistics)
        torch.testing.assert_close(total["head_losses"], union[0])
        assert total["class_samples"].tolist() == union[1].tolist()
        shared = recipe.shared.update(shared, total)
        old_losses, old_samples = 0.5 * old_losses + union[0], 0.5 * old_samples + union[1]
        expected = assign_classes((old_losses / old_samples).double().numpy(), 3)
        assert (shared["sets"].numpy() == expected).all()
        assert shared["rounds"] == round_number
    other = assign_classes((union[0] / union[1]).double().numpy(), 3)
    assert (other != expected).any()  # with the new losses alone the sets are others


def test_classes_stay_after_the_rounds_of_assignment() -> None:
    method = DPSSL(num_functions=6, heads_per_class=3, functions_rounds=5, assignment_rounds=2)
    recipe = recipe_of(replace(method, label_model_rounds=2))
    shared, sent = recipe.shared.start(), []
    for rounds in range(8):
        memory = memory_of(recipe, {**shared, "rounds": torch.tensor(float(rounds))})
        sent.append("".join(sorted(name[0] for name in recipe.shared.statistics(memory))))
    assert sent == ["ch"] * 2 + [""] * 3 + ["cv"] * 2 + [""]
    after = recipe.shared.update(shared, {})
    assert all(torch.equal(after[name], shared[name]) for name in shared if name != "rounds")
    assert after["rounds"] == 1
    drawn = recipe_of(DPSSL(assignment="random", num_functions=9))
    assert drawn.shared.statistics(memory_of(drawn, drawn.shared.start())) == {}


def functions_of(functions: str, seed: int = 2, n: int = 300, k: int = 20) -> tuple[DPSSL, Tensor, Tensor, State]:
    """A method at its first round of the label model, votes (n, k), class sets, and what is shared."""
    votes, sets, _, _ = simulate(seed, n=n, k=k)
    common: dict[str, Any] = {"functions": functions, "num_functions": k, "label_model_rounds": 6, "decay": 0.0}
    if functions == "written":
        method = DPSSL(**common)
        return method, votes, torch.ones_like(sets), recipe_of(method, 10).shared.start()
    method = DPSSL(**common, functions_rounds=2, assignment_rounds=1)
    shared = {**recipe_of(method, 10).shared.start(), "sets": sets.float(), "rounds": torch.tensor(2.0)}
    return method, votes, sets, shared


def prepare(recipe: Recipe, shared: State, logits: Tensor, known: Supervision) -> Prepared:
    """The E step of the round that comes next at a client whose heads have these logits."""
    (phase,) = recipe.phases(int(shared["rounds"]) + 1)
    assert phase.prepare is not None
    return phase.prepare(surveyed(logits, known, memory_of(recipe, shared)))


def annotated(method: DPSSL, votes: Tensor, known: Supervision, shared: State, count: bool = True) -> Prepared:
    """The next round's E step; if nothing is to be counted, that of a late round."""
    classes = known.candidates.shape[1]
    state = shared if count else {**shared, "rounds": torch.tensor(float(LATE))}
    return prepare(recipe_of(method, classes), state, certainly(votes, classes), known)


def a_round(method: DPSSL, votes: Sequence[Tensor], known: Sequence[Supervision], shared: State) -> State:
    """What the server shares after a round of the label model in which all clients take part."""
    recipe, statistics = recipe_of(method, known[0].candidates.shape[1]), []
    for own, record in zip(votes, known, strict=True):
        prepared = annotated(method, own, record, shared)
        assert prepared.memory is not None
        statistics.append(recipe.shared.statistics(prepared.memory))
    return recipe.shared.update(shared, summed(statistics))


def fitted(sets: Tensor, shared: State, **options: Any) -> LabelModel:
    """The label model of what is shared."""
    model = LabelModel(sets.shape[1], sets, **options)
    model.tables, model.prior = shared["tables"].double(), shared["prior"].double() / shared["prior"].double().sum()
    return model


@pytest.mark.parametrize("functions", ["grown", "written"])
@pytest.mark.parametrize("variant", ["full", "tied"])
def test_federated_em_is_em_of_the_pooled_votes(functions: str, variant: str) -> None:
    """Six rounds over clients of 200, 1 and 99 unlabelled samples and one that has labels only, of which nothing is
    counted. What is shared has 24 bits, so tables differ by a rounding (measured 6e-8) and posteriors of 20 votes by
    several (4e-7). Not "cage", whose climb stops before its top and so depends on the last bits."""
    method, votes, sets, shared = functions_of(functions)
    method = replace(method, variant=variant)
    parts = [*votes.split([200, 1, 99]), votes[:5]]
    known = [voted(own, classes=10) for own in parts[:-1]] + [voted(parts[-1], torch.arange(5), 10)]
    central = LabelModel(10, sets, variant)
    for step in range(6):
        shared = a_round(method, parts, known, shared)
        central.update(central.initial_counts(votes) if step == 0 else central.expected_counts(votes))
        torch.testing.assert_close(shared["tables"].double(), central.tables, rtol=0, atol=1e-6)
        torch.testing.assert_close(shared["prior"].double(), central.prior, rtol=0, atol=1e-6)
    assert shared["fitted"] == 6
    found = annotated(method, votes, voted(votes, classes=10), shared, count=False).targets["target"]
    torch.testing.assert_close(found.double(), central.posterior(votes), rtol=0, atol=1e-6)
    recipe = recipe_of(method, 10)
    accuracy = recipe.inspect(shared)["function_accuracy"]
    torch.testing.assert_close(accuracy, central.accuracy(), rtol=0, atol=1e-6)
    assert recipe.inspect(recipe.shared.start()) == {}
    moved = (central.tables - LabelModel(10, sets, variant).tables).abs().max()
    assert moved > 0.1


def test_the_first_round_of_the_label_model_guesses_from_votes() -> None:
    method, votes, sets, shared = functions_of("grown")
    prepared = annotated(method, votes, voted(votes, classes=10), shared)
    guess = LabelModel(10, sets).guess(votes)
    torch.testing.assert_close(prepared.targets["target"], guess.float())
    assert prepared.pseudo is not None
    assert prepared.pseudo.label.tolist() == guess.argmax(1).tolist()
    assert prepared.votes is not None
    assert torch.equal(prepared.votes.cast, votes)
    assert torch.equal(prepared.votes.class_sets, sets)


def test_without_counting_the_sums_stay() -> None:
    method, votes, _, shared = functions_of("written")
    prepared = annotated(method, votes, voted(votes, classes=10), shared, count=False)
    assert prepared.memory is not None
    assert prepared.memory["vote_counts"].abs().sum() == 0


def test_labels_are_held_and_weighed_from_the_second_round_on() -> None:
    """Of 300 samples 40 have a label: in the first round they count nothing, then 3 each, in their class."""
    method, votes, sets, shared = functions_of("grown")
    method = replace(method, label_weight=3.0)
    labels = torch.where(torch.arange(300) < 40, torch.arange(300) % 10, -1)
    known = voted(votes, labels, 10)
    first = annotated(method, votes, known, shared)
    assert first.memory is not None
    assert first.memory["class_counts"].sum().item() == pytest.approx(260, abs=1e-3)
    shared = a_round(method, [votes], [known], shared)
    second = annotated(method, votes, known, shared)
    assert second.memory is not None
    expected = fitted(sets, shared).posterior(votes[40:]).sum(0) + 3 * 4
    torch.testing.assert_close(second.memory["class_counts"], expected.float())
    without = annotated(replace(method, label_weight=0.0), votes, known, shared)
    assert without.memory is not None
    torch.testing.assert_close(without.memory["class_counts"], (expected - 12).float())


def test_a_noisy_label_is_none_to_the_label_model() -> None:
    method, votes, _, shared = functions_of("written")
    labels = torch.where(torch.arange(300) < 40, 0, -1)
    known = replace(voted(votes, labels, 10), noisy=labels >= 0)
    prepared = annotated(replace(method, label_weight=3.0), votes, known, shared)
    assert prepared.memory is not None
    assert prepared.memory["class_counts"].sum().item() == pytest.approx(300, abs=1e-3)


def test_a_prior_that_is_to_be_even_stays_even() -> None:
    method, votes, sets, shared = functions_of("written", n=100)
    votes = votes[votes.amax(1) < 5]  # of some classes hardly a vote
    for prior, is_even in (("uniform", True), ("learnt", False)):
        state = shared
        for _ in range(3):
            state = a_round(replace(method, prior=prior), [votes], [voted(votes, classes=10)], state)
        assert torch.allclose(state["prior"], torch.full((10,), 0.1)) == is_even
    assert len(sets) == 20


def test_decay_keeps_a_part_of_earlier_counts() -> None:
    """Of K = 1 and C = 2 with smoothing 2: (.5 * 6 + 1 + 1) / (...) by hand."""
    method = DPSSL(functions="written", num_functions=1, decay=0.5, smoothing=3.0)
    federated = recipe_of(method, 2).shared
    shared = federated.start()

    def total(votes: list[list[float]]) -> State:
        counts = torch.tensor([votes])
        return {"vote_counts": counts, "class_counts": counts[0].sum(0)}

    shared = federated.update(shared, total([[6, 0], [0, 4], [0, 0]]))
    expected = torch.tensor([[7 / 9, 1 / 7], [1 / 9, 5 / 7], [1 / 9, 1 / 7]])
    torch.testing.assert_close(shared["tables"][0], expected)
    torch.testing.assert_close(shared["prior"], torch.tensor([9 / 16, 7 / 16]))
    shared = federated.update(shared, total([[1, 1], [0, 0], [2, 0]]))
    expected = torch.tensor([[5 / 9, 2 / 6], [1 / 9, 3 / 6], [3 / 9, 1 / 6]])  # (3 + 1 + 1) / (3 + 3 + 3), ...
    torch.testing.assert_close(shared["tables"][0], expected)
    torch.testing.assert_close(shared["prior"], torch.tensor([9 / 15, 6 / 15]))
    nobody = federated.update(shared, total([[0, 0], [0, 0], [0, 0]]))
    assert all(torch.equal(nobody[name], shared[name]) for name in shared if name != "rounds")


@pytest.mark.parametrize("learn", [False, True])
def test_samples_on_which_all_are_silent_are_learnt_only_where_asked_for(learn: bool) -> None:
    method, votes, _, shared = functions_of("grown")
    votes = votes.clone()
    votes[::3] = -1
    prepared = annotated(replace(method, learn_silent=learn), votes, voted(votes, classes=10), shared)
    silent = (votes < 0).all(1)
    assert 100 <= int(silent.sum()) < 300
    assert prepared.pseudo is not None
    assert torch.equal(prepared.pseudo.keep, ~silent | learn)
    assert torch.equal(prepared.targets["target"].sum(1) > 0, ~silent | learn)


def test_hard_labels_and_least_confidence() -> None:
    method, votes, _, shared = functions_of("written")
    known = voted(votes, classes=10)
    shared = a_round(method, [votes], [known], shared)
    soft = annotated(method, votes, known, shared).targets["target"]
    strict = annotated(replace(method, hard=True, least_confidence=0.6), votes, known, shared)
    confidence, likeliest = soft.max(1)
    keep = confidence >= 0.6
    assert 0 < keep.sum() < len(keep)
    expected = torch.nn.functional.one_hot(likeliest, 10) * keep[:, None]
    torch.testing.assert_close(strict.targets["target"], expected.float())
    assert strict.pseudo is not None
    assert torch.equal(strict.pseudo.keep, keep)
    torch.testing.assert_close(strict.pseudo.confidence, confidence)


def test_threshold_and_temperature_reach_votes_and_posterior() -> None:
    """Heads that are sure at e^.5 / (e^.5 + |set|) at most, so abstain; kappa = .5 under tables that are fitted."""
    method, votes, sets, shared = functions_of("grown")
    known = voted(votes, classes=10)
    for threshold, said in ((0.0, votes), (0.7, torch.full_like(votes, -1))):
        recipe = recipe_of(replace(method, vote_threshold=threshold), 10)
        cast = prepare(recipe, shared, certainly(votes, 10) / 18, known).votes
        assert cast is not None
        assert torch.equal(cast.cast, said)
    shared = a_round(method, [votes], [known], shared)
    flat = fitted(sets, shared, temperature=0.5)
    found = annotated(replace(method, temperature=0.5), votes, known, shared).targets["target"]
    torch.testing.assert_close(found, flat.posterior(votes).float())
    sharp = annotated(method, votes, known, shared).targets["target"]
    assert (found - sharp).abs().max() > 0.05


def test_silence_may_be_ignored() -> None:
    method, votes, sets, shared = functions_of("grown")
    known = voted(votes, classes=10)
    blind = replace(method, abstentions=False)
    shared = a_round(blind, [votes], [known], shared)
    alone = LabelModel(10, sets, prior=None, abstentions=False)
    alone.update(alone.initial_counts(votes))
    torch.testing.assert_close(shared["tables"], alone.tables.float())
    found = annotated(blind, votes, known, shared).targets["target"]
    torch.testing.assert_close(found, alone.posterior(votes).float() * (votes >= 0).any(1, keepdim=True))
    assert (
        found - annotated(method, votes, known, a_round(method, [votes], [known], shared)).targets["target"]
    ).abs().max() > 0.05


def test_samples_that_functions_were_not_given_are_not_learnt_nor_counted() -> None:
    method, votes, _, shared = functions_of("written")
    known = voted(votes.masked_fill((torch.arange(300) < 100)[:, None], -2), classes=10)
    prepared = annotated(method, votes, known, shared)
    assert prepared.memory is not None
    assert prepared.memory["class_counts"].sum().item() == pytest.approx(200, abs=1e-3)
    assert prepared.targets["target"][:100].abs().sum() == 0
    assert prepared.pseudo is not None
    assert prepared.pseudo.keep.tolist() == [False] * 100 + [True] * 200
    assert prepared.votes is not None
    assert (prepared.votes.cast[:100] == -2).all()
    assert torch.equal(prepared.votes.cast[100:], votes[100:])


@pytest.mark.parametrize("variant", ["full", "tied"])
def test_one_head_of_all_classes_is_pseudo_labelling(variant: str) -> None:
    """Check 11."""
    votes = torch.randint(4, (200, 1), generator=torch.Generator().manual_seed(0))
    method = DPSSL(num_functions=1, functions_rounds=2, assignment_rounds=1, label_model_rounds=5, variant=variant)
    shared = {**recipe_of(method, 4).shared.start(), "rounds": torch.tensor(2.0)}
    assert shared["sets"].tolist() == [[1, 1, 1, 1]]
    for _ in range(5):
        shared = a_round(method, [votes], [voted(votes, classes=4)], shared)
    prepared = annotated(method, votes, voted(votes, classes=4), shared)
    assert prepared.targets["target"].argmax(1).tolist() == votes[:, 0].tolist()
    assert prepared.targets["target"].amax(1).min() > 0.9


# ----------------------------------------------------------------------------------------------- a client's own classes


def test_each_client_reads_its_votes_under_its_own_prior_and_sends_none() -> None:
    method, _, _, shared = functions_of("written", k=15)
    model, votes = skewed()
    method = replace(method, prior="client")
    shared |= {"fitted": torch.tensor(1.0), "tables": model.tables.float(), "prior": model.prior.float()}
    shared["sets"] = torch.ones(15, 10)
    prepared = annotated(method, votes, voted(votes, classes=10), shared)
    own = fitted(torch.ones(15, 10).bool(), shared)
    own.prior = client_prior(own, votes)
    torch.testing.assert_close(prepared.targets["target"], own.posterior(votes).float())
    common = annotated(replace(method, prior="learnt"), votes, voted(votes, classes=10), shared)
    assert (prepared.targets["target"] - common.targets["target"]).abs().max() > 0.05
    assert prepared.memory is not None
    assert torch.equal(prepared.memory["prior"], shared["prior"])
    torch.testing.assert_close(prepared.memory["class_counts"], own.posterior(votes).sum(0).float())
    labeled_only = voted(votes[:4], torch.zeros(4).long(), 10)
    alone = annotated(method, votes[:4], labeled_only, shared)  # it has nothing to tell it from the others
    torch.testing.assert_close(alone.targets["target"], common.targets["target"][:4])


# ------------------------------------------------------------------------------------------------ clients of each kind


def grown_round(round_number: int, known: Supervision, shared: State, method: DPSSL) -> ClientUpdate:
    def module(seed: int) -> LabelingHeads:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LabelingHeads(Mlp((1, 6, 6), CLASSES, (8,)), method.num_functions)

    state: StateDict = module(1).state_dict()
    data = ClientData(client().images[: len(known.noisy)], known)
    trainer = Trainer(module(2), module(3), TRANSFORM, TrainingConfig(lr=0.1, batch_size=8, local_steps=2))
    before = {"previous": state} if round_number > method.functions_rounds else {}
    return train_client(recipe_of(method), trainer, state, data, round_number, 5, shared, before)


@pytest.mark.parametrize("labeled", [0, 30, 12], ids=["no labels", "labels only", "both"])
@pytest.mark.parametrize("prior", ["learnt", "client"])
def test_a_client_of_any_kind_takes_part_in_every_stage(labeled: int, prior: str) -> None:
    """Rounds: measure, learn; guess, EM; end model. What it has nothing of it counts as 0."""
    method = DPSSL(
        num_functions=4, heads_per_class=2, functions_rounds=2, assignment_rounds=1, label_model_rounds=2,
        confidence_threshold=0.3, prior=prior, label_weight=0.5, lambda_c=1.0,
    )  # fmt: skip
    labels = torch.arange(30) % CLASSES
    known = reveal_labels(labels, torch.arange(30) < labeled, CLASSES)
    both = reveal_labels(labels, torch.arange(30) < 10, CLASSES)
    recipe = recipe_of(method)
    shared = recipe.shared.start()
    free = 30 - labeled
    for round_number in range(1, 6):
        update = grown_round(round_number, known, shared, method)
        other = grown_round(round_number, both, shared, method)
        assert all(value.isfinite().all() for value in update.parts["model"].state.values())
        assert all(value.isfinite().all() for value in update.statistics.values())
        weight = update.parts["model"].weight
        assert (weight > 0) == (round_number in (2, 5))
        if round_number == 1:
            assert update.statistics["class_samples"].sum() == labeled
        if round_number in (3, 4):
            counted = free + 0.5 * labeled * (round_number == 4)
            assert update.statistics["class_counts"].sum().item() == pytest.approx(counted, abs=1e-4)
        assert (update.votes is not None) == (round_number > 2)
        total = summed([update.statistics, other.statistics]) if update.statistics else {}
        shared = recipe.shared.update(shared, total)
    assert shared["fitted"] == 2
    assert (update.pseudo is None or len(update.pseudo.label) == 0) == (free == 0)


def test_only_measuring_moves_nothing_and_looks_once_at_each_sample() -> None:
    method = DPSSL(num_functions=4, heads_per_class=2, functions_rounds=2, assignment_rounds=1)
    known = reveal_labels(torch.arange(30) % CLASSES, torch.arange(30) < 12, CLASSES)
    update = grown_round(1, known, recipe_of(method).shared.start(), method)
    assert (update.forward, update.backward, update.parts["model"].weight) == (30, 0, 0)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"functions": "bought"}, r"`method.functions` \(=bought\) must be one of grown, written"),
        ({"assignment": "auction"}, r"`method.assignment` \(=auction\) must be one of wta, random"),
        ({"variant": "snorkel"}, r"`method.variant` \(=snorkel\) must be one of full, tied, cage"),
        ({"prior": "even"}, r"`method.prior` \(=even\) must be one of learnt, uniform, client"),
        ({"end_start": "cold"}, r"`method.end_start` \(=cold\) must be one of fresh, warm"),
        ({"num_functions": 0}, r"`method.num_functions` \(=0\) must lie in \[1, "),
        ({"functions_rounds": 0}, r"`method.functions_rounds` \(=0\) must be at least 1"),
        ({"label_model_rounds": 0}, r"`method.label_model_rounds` \(=0\) must be at least 1"),
        ({"assignment_rounds": 0}, r"`method.assignment_rounds` \(=0\) must be at least 1"),
        ({"lambda_u": -1.0}, r"`method.lambda_u` \(=-1.0\) must be a finite"),
        ({"lambda_e": math.inf}, r"`method.lambda_e` \(=inf\) must be a finite"),
        ({"lambda_c": math.nan}, r"`method.lambda_c` \(=nan\) must be a finite"),
        ({"label_weight": -0.1}, r"`method.label_weight` \(=-0.1\) must be a finite"),
        ({"confidence_threshold": 1.1}, r"`method.confidence_threshold` \(=1.1\) must lie in \[0, 1\]"),
        ({"vote_threshold": -0.1}, r"`method.vote_threshold` \(=-0.1\) must lie in \[0, 1\]"),
        ({"least_confidence": 2.0}, r"`method.least_confidence` \(=2.0\) must lie in \[0, 1\]"),
        ({"averaging_decay": 1.0}, r"`method.averaging_decay` \(=1.0\) must lie in \[0, 1\)"),
        ({"decay": 1.0}, r"`method.decay` \(=1.0\) must lie in \[0, 1\)"),
        ({"smoothing": 0.0}, r"`method.smoothing` \(=0.0\) must be a positive"),
        ({"temperature": 0.0}, r"`method.temperature` \(=0.0\) must lie in \(0, 1\]"),
        ({"temperature": 1.1}, r"`method.temperature` \(=1.1\) must lie in \(0, 1\]"),
        ({"assignment_rounds": 40}, r"`method.assignment_rounds` \(=40\) must be below `method.functions_rounds`"),
        ({"functions": "written", "end_start": "warm"}, r"`method.end_start` \(=warm\) .* written functions have no"),
        ({"functions": "written", "vote_threshold": 0.5}, r"`method.vote_threshold` \(=0.5\) are for .*=grown"),
        ({"least_classes": 0}, r"`method.least_classes` \(=0\) must be at least 1"),
        ({"least_classes": 4}, r"`method.least_classes` \(=4\) .* at most `method.most_classes` \(=3\)"),
    ],
)
def test_bad_fields_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPSSL(**changes)  # type: ignore[arg-type]


def test_fields_of_the_other_way_to_get_functions_or_sets_do_not_matter() -> None:
    assert stages_of(DPSSL(functions="written", functions_rounds=1), 1) == ["label model"]
    assert phase_of(DPSSL(assignment="random", assignment_rounds=40), 2).prepare is None


@pytest.mark.parametrize(
    ("changes", "written", "message"),
    [
        (
            {"functions": "written"},
            0,
            r"`method.num_functions` \(=50\) must be the number of .* 0: set supervision.kind",
        ),
        (
            {"functions": "written", "num_functions": 3},
            2,
            r"`method.num_functions` \(=3\) must be the number of labelling functions, 2\.",
        ),
        ({}, 2, r"`method.functions` \(=grown\): there are 2 written .*num_functions=2"),
        ({"heads_per_class": 4}, 0, r"`method.heads_per_class` \(=4\) must lie in \[5, 50\] .* 10 classes"),
        ({"heads_per_class": 51}, 0, r"`method.heads_per_class` \(=51\) must lie in \[5, 50\]"),
        ({"assignment": "random", "num_functions": 5}, 0, r"`method.num_functions` \(=5\) with sets of"),
        (
            {"assignment": "random", "most_classes": 11},
            0,
            r"`method.most_classes` \(=11\) must be at most the 10 classes",
        ),
    ],
)
def test_what_does_not_fit_the_federation_is_named(changes: dict[str, object], written: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPSSL(**changes).recipe(task(10, votes=((1,) * 10,) * written))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("functions", "classes", "rho"), [(50, 10, 10), (100, 100, 15), (20, 2, 10), (3, 10, 1), (12, 2, 6), (200, 10, 20)]
)
def test_heads_per_class_by_default(functions: int, classes: int, rho: int) -> None:
    """K / 5, at most 15, and as many as no head without a class needs; the first sets are of these sizes."""
    sets = recipe_of(DPSSL(num_functions=functions), classes).shared.start()["sets"]
    assert (sets.sum(0) == rho).all()
    assert sets.sum(1).min() >= 1
    assert set(sets.unique().tolist()) <= {0, 1}


def test_written_functions_need_no_label_and_may_vote_for_all_classes() -> None:
    votes = ((1, 0, 0), (0, 1, 1))
    method = DPSSL(functions="written", num_functions=2)
    sets = method.recipe(task(3, votes=votes, true=0, noisy=0)).shared.start()["sets"]
    assert sets.tolist() == [[1, 1, 1], [1, 1, 1]]
    drawn = DPSSL(assignment="random", num_functions=30, sets_seed=4)
    assert (recipe_of(drawn).shared.start()["sets"].numpy() == random_classes(30, 3, 1, 3, 4)).all()


def test_clients_get_what_they_need_alone() -> None:
    method = DPSSL(num_functions=4, heads_per_class=2, functions_rounds=2, assignment_rounds=1, label_model_rounds=2)
    federated = recipe_of(method).shared
    shared = federated.start()
    needed = {"rounds", "fitted", "sets"}
    assert federated.broadcast(shared).keys() == needed
    assert federated.broadcast({**shared, "rounds": torch.tensor(1.0)}).keys() == needed
    for rounds in (2, 3, 4):
        sent = federated.broadcast({**shared, "rounds": torch.tensor(float(rounds))})
        assert sent.keys() == needed | {"tables", "prior"}


def test_grown_functions_vote_once() -> None:
    """What a client keeps are its votes; with them nothing is sent through the functions again."""
    method, votes, _, shared = functions_of("grown")
    known = voted(votes, classes=10)
    first = annotated(method, votes, known, shared)
    assert first.memory is not None
    recipe = recipe_of(method, 10)
    kept = recipe.memory.keep(first.memory, [])
    assert torch.equal(kept["votes"].long(), votes)

    def never(*_: Any) -> Tensor:
        raise AssertionError

    prepare_again = recipe.phases(3)[0].prepare
    assert prepare_again is not None
    again = prepare_again(Survey(never, known, {**memory_of(recipe, shared), **kept}))
    torch.testing.assert_close(again.targets["target"], first.targets["target"])
    assert recipe.memory.keep(memory_of(recipe, shared), []) == {}
