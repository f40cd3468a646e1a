"""FedLabel against the worked numbers of the paper's equations; the docstrings derive them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlabel.inference.calibration import inverse_temperature, mixture_weight
from fedlabel.learning.client import LocalRound, Trainer, train_clients
from fedlabel.methods.batch import State, StateDict, Step, Survey
from fedlabel.methods.fedlabel import FedLabel, confidence, held_out_samples, kl_divergence, mix, select
from fedlabel.methods.losses import labels_loss
from fedlabel.methods.uploads import ModelPart, PhaseResult
from tests.learning.clients import TRANSFORM
from tests.methods.batches import make_batch
from tests.methods.recipes import task
from tests.methods.sets import sets
from tests.methods.tables import CLASSES, ROUND, assert_all_moved, client, model, net, same, train_round

LOCAL = torch.tensor([[0.7, 0.1, 0.1, 0.1]])
GLOBAL = torch.tensor([[0.5, 0.3, 0.1, 0.1]])


def loss_of(
    method: FedLabel,
    global_probs: Tensor,
    local_probs: Tensor,
    student_logits: Tensor | None = None,
    memory: State | None = None,
) -> Step:
    n, classes = global_probs.shape
    logits = torch.zeros(n, classes) if student_logits is None else student_logits
    teachers = {"global": lambda x: global_probs.log(), "supervised": lambda x: local_probs.log()}
    return method.loss(lambda x: torch.cat([logits, logits]), teachers, make_batch(classes, unlabeled=n, memory=memory))


def upload(method: FedLabel, start: StateDict, results: list[PhaseResult], weight: float) -> dict[str, ModelPart]:
    return method.recipe(task()).upload.send(start, results, frozenset(start), weight)


def test_check_1_variance_has_its_closed_form() -> None:
    """h(s) = (||s||^2 - 1/N) / (N - 1): (.7,.1,.1,.1) gives (.52 - .25) / 3 = .09."""
    probs = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.5, 0.3, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1], [0.25] * 4])
    assert confidence(probs).tolist() == pytest.approx([0.09, 0.0366667, 0.0166667, 0], abs=1e-6)
    for n in (10, 100):
        assert confidence(torch.eye(n)[:1]).item() == pytest.approx(1 / n)
    random = torch.rand(50, 7).softmax(-1)
    closed = ((random**2).sum(-1) - 1 / 7) / 6
    torch.testing.assert_close(confidence(random), closed, atol=1e-6, rtol=1e-4)


def test_check_1_entropy_score() -> None:
    """H(.7,.1,.1,.1) = .940448 and H(.5,.3,.1,.1) = 1.168282; a one-hot vector has H = 0 and not NaN."""
    assert (1 / confidence(LOCAL, "entropy") - 1e-5).item() == pytest.approx(0.940448, abs=1e-5)
    assert (1 / confidence(GLOBAL, "entropy") - 1e-5).item() == pytest.approx(1.168282, abs=1e-5)
    assert confidence(torch.eye(3), "entropy").tolist() == pytest.approx([1e5] * 3)
    with pytest.raises(ValueError, match=r"`score` \(=gini\) must be one of variance, entropy"):
        confidence(LOCAL, "gini")


def test_check_2_selection_threshold_and_weight() -> None:
    """Variances .09 (local) and .0366667 (global): local wins, weight .0366667 / .09 = .407407; max .7 > beta."""
    chosen = select(GLOBAL, LOCAL, 0.3, 1.0)
    assert chosen.pseudo_label.item() == 0
    assert not chosen.from_global.item()
    assert chosen.agree.item()
    assert chosen.keep.item()
    assert chosen.weight.item() == pytest.approx(0.407407, abs=1e-6)
    assert not select(GLOBAL.double(), torch.tensor([[0.7, 0.1, 0.1, 0.1]]).double(), 0.7, 1.0).keep.item()  # strict
    assert select(GLOBAL, LOCAL, 0.69, 1.0).keep.item()
    assert select(GLOBAL, LOCAL, 0.3, 2.0).weight.item() == pytest.approx(2 * 0.407407, abs=1e-6)
    assert select(GLOBAL, LOCAL, 0.3, 1.0, "entropy").weight.item() == pytest.approx(0.80499, abs=1e-4)


def test_check_3_variance_of_softmax_not_of_logits() -> None:
    """z_L = (4,0,0,0) has logit variance 4, z_G = (6,5.9,0,0) 11.8025; of softmax it is .216482 against .082884."""
    local_logits, global_logits = torch.tensor([[4.0, 0, 0, 0]]), torch.tensor([[6, 5.9, 0, 0]])
    assert local_logits.var() < global_logits.var()
    assert confidence(local_logits.softmax(-1)).item() == pytest.approx(0.216482, abs=1e-5)
    assert confidence(global_logits.softmax(-1)).item() == pytest.approx(0.082884, abs=1e-5)
    method = FedLabel(confidence_threshold=0.0)
    step = loss_of(method, global_logits.exp(), local_logits.exp())  # teachers return .log() of this: the logits
    assert step.pseudo is not None
    assert not step.pseudo.from_global.item()
    # Variance and largest probability may disagree: variance decides.
    first, second = torch.tensor([[0.60, 0.40, 0, 0]]), torch.tensor([[0.65, 0.1167, 0.1167, 0.1166]])
    assert confidence(first).item() == pytest.approx(0.09, abs=1e-6)
    assert confidence(second).item() == pytest.approx(0.0711, abs=1e-4)
    assert select(first, second, 0.0, 1.0).from_global.item()


@pytest.mark.parametrize(
    ("direction", "kl", "total"),
    [("teacher_student", 0.2180119, 1.4751140), ("student_teacher", 0.2392782, 1.4837781)],
)
def test_check_4_loss_value_and_kl_direction(direction: str, kl: float, total: float) -> None:
    """Uniform student: CE = ln 4 = 1.3862944; KL(discarded || uniform) = ln 4 - H = 1.3862944 - 1.1682825 = .2180119.

    Total = 1.3862944 + .4074074 * .2180119 = 1.4751140; with the reversed KL (.2392782) it is 1.4837781.
    """
    method = FedLabel(confidence_threshold=0.3, kl_direction=direction)
    assert loss_of(method, GLOBAL, LOCAL).loss.item() == pytest.approx(total, abs=1e-6)
    uniform = torch.full((1, 4), 0.25).log()
    pair = (GLOBAL.log(), uniform) if direction == "teacher_student" else (uniform, GLOBAL.log())
    assert kl_divergence(*pair).item() == pytest.approx(kl, abs=1e-6)
    without = FedLabel(confidence_threshold=0.3, lambda_0=0.0, kl_direction=direction)
    assert loss_of(without, GLOBAL, LOCAL).loss.item() == pytest.approx(math.log(4), abs=1e-6)


def test_check_4_one_hot_teacher_gives_a_finite_loss() -> None:
    """0 * log 0 = 0 in the KL's target."""
    sure = torch.tensor([[0.0, -math.inf, -math.inf, -math.inf]])
    assert kl_divergence(sure, torch.full((1, 4), 0.25).log()).item() == pytest.approx(math.log(4))


def test_check_5_disagreement_gives_no_consistency_term() -> None:
    """The discarded model names class 1, the selected one class 0: loss is CE alone, whatever lambda_0."""
    other = torch.tensor([[0.1, 0.6, 0.2, 0.1]])
    gradients = []
    for lambda_0 in (0.0, 5.0):
        logits = torch.tensor([[0.3, -0.2, 0.1, 0.0]], requires_grad=True)
        step = loss_of(FedLabel(confidence_threshold=0.3, lambda_0=lambda_0), other, LOCAL, logits)
        step.loss.backward()
        assert step.metrics["train/loss_consistency"][0].item() == 0
        gradients.append(logits.grad)
    assert torch.equal(gradients[0], gradients[1])


def test_check_6_weight_bound_and_symmetry() -> None:
    generator = torch.Generator().manual_seed(0)
    first = (2 * torch.randn(500, 5, generator=generator)).softmax(-1)
    second = (2 * torch.randn(500, 5, generator=generator)).softmax(-1)
    chosen = select(first, second, 0.4, 3.0)
    assert (chosen.weight >= 0).all()
    assert (chosen.weight < 3.0).all()  # equality only for equal scores
    assert select(first, first.flip(-1), 0.4, 3.0).weight.tolist() == pytest.approx([3.0] * 500, rel=1e-4)
    swapped = select(second, first, 0.4, 3.0)
    assert torch.equal(chosen.pseudo_label, swapped.pseudo_label)
    assert torch.equal(chosen.weight, swapped.weight)
    assert torch.equal(chosen.from_global, ~swapped.from_global)
    method = FedLabel()
    assert loss_of(method, first, second).loss.item() == pytest.approx(loss_of(method, second, first).loss.item())


def test_tie_goes_to_the_global_model_and_two_uniform_models_are_equally_sure() -> None:
    assert select(LOCAL, LOCAL, 0.3, 1.0).from_global.item()
    uniform = torch.full((1, 4), 0.25)
    assert select(uniform, uniform, 0.0, 1.5).weight.item() == 1.5


def test_check_7_no_gradient_reaches_the_teachers() -> None:
    global_logits = torch.randn(8, 4, requires_grad=True)
    local_logits = torch.randn(8, 4, requires_grad=True)
    student_logits = torch.randn(16, 4, requires_grad=True)
    teachers = {"global": lambda x: global_logits, "supervised": lambda x: local_logits}
    step = FedLabel(confidence_threshold=0.0).loss(lambda x: student_logits, teachers, make_batch(4, unlabeled=8))
    step.loss.backward()
    assert global_logits.grad is None
    assert local_logits.grad is None
    assert student_logits.grad.abs().sum() > 0
    assert not select(global_logits.softmax(-1), local_logits.softmax(-1), 0.0, 1.0).weight.requires_grad


def test_check_8_threshold_of_one_keeps_nothing() -> None:
    """max(s*) > 1 is impossible: loss exactly 0 and not NaN, no example, no gradient."""
    logits = torch.randn(6, 4, requires_grad=True)
    step = loss_of(
        FedLabel(confidence_threshold=1.0), torch.eye(4)[[0, 1, 2, 3, 0, 1]] + 1e-30, GLOBAL.repeat(6, 1), logits
    )
    step.loss.backward()
    assert step.loss.item() == 0
    assert step.examples.item() == 0
    assert logits.grad.abs().sum() == 0


def test_check_8_equal_teachers_agree_everywhere_with_full_weight() -> None:
    probs = torch.randn(20, 4).softmax(-1)
    chosen = select(probs, probs, 0.0, 0.7)
    assert chosen.agree.all()
    assert torch.equal(chosen.weight, torch.full((20,), 0.7))


def test_check_9_released_merge_sends_two_models() -> None:
    """w = 0; a client with 3 kept samples sends w_L with weight 1 and w_U with weight 3; none kept counts as 1."""
    start = {"w": torch.zeros(())}
    results = [
        PhaseResult("supervised", {"w": torch.tensor(1.0)}, 30),
        PhaseResult("unlabeled", {"w": torch.tensor(0.5)}, 3),
    ]
    parts = upload(FedLabel(merge="mean"), start, results, 33.0)
    assert parts == {
        "supervised": ModelPart({"w": torch.tensor(1.0)}, 1.0),
        "unlabeled": ModelPart({"w": torch.tensor(0.5)}, 3),
    }
    nothing_kept = [results[0], PhaseResult("unlabeled", {"w": torch.tensor(0.0)}, 0)]
    assert upload(FedLabel(merge="mean"), start, nothing_kept, 30.0)["unlabeled"].weight == 1.0
    burn_in = upload(FedLabel(merge="mean"), start, results[:1], 30.0)
    assert burn_in["unlabeled"] == ModelPart({"w": torch.tensor(0.0)}, 1.0)


def test_check_9_paper_merge_is_the_sum_of_updates() -> None:
    """w = 0, dL = 1, dU = .5 -> 1.5, one model, weight r_k."""
    start = {"w": torch.zeros(())}
    results = [
        PhaseResult("supervised", {"w": torch.tensor(1.0)}, 20),
        PhaseResult("unlabeled", {"w": torch.tensor(0.5)}, 10),
    ]
    assert upload(FedLabel(), start, results, 30.0) == {"model": ModelPart({"w": torch.tensor(1.5)}, 30.0)}


def test_check_11_kept_sets_are_nested() -> None:
    first, second = torch.randn(2, 300, 6).softmax(-1)
    previous = np.ones(300, dtype=bool)
    for beta in (0.0, 1 / 6, 0.3, 0.5, 0.8, 1.0):
        kept = select(first, second, beta, 1.0).keep.numpy()
        assert (kept <= previous).all()
        previous = kept
    assert select(first, second, 0.0, 1.0).keep.all()
    uniform = torch.full((3, 6), 1 / 6)
    assert not select(uniform, uniform, 1 / 6, 1.0).keep.any()


def test_single_teacher_ablations_use_one_model_as_both_experts() -> None:
    """Only-local on check 2's sample: label 0 from the local model, consistency to itself with weight lambda_0."""
    disagreeing = torch.tensor([[0.1, 0.6, 0.2, 0.1]])
    local = loss_of(FedLabel(confidence_threshold=0.3, teacher="local"), disagreeing, LOCAL)
    from_global = loss_of(FedLabel(confidence_threshold=0.3, teacher="global"), disagreeing, LOCAL)
    assert local.pseudo is not None
    assert from_global.pseudo is not None
    assert (local.pseudo.label.item(), local.pseudo.from_global.item()) == (0, False)
    assert (from_global.pseudo.label.item(), from_global.pseudo.from_global.item()) == (1, True)
    entropy = -(LOCAL * LOCAL.log()).sum().item()
    assert local.loss.item() == pytest.approx(math.log(4) + math.log(4) - entropy, abs=1e-6)


def test_normalization_divides_by_kept_by_batch_or_by_each_term() -> None:
    """Four samples, beta .6: two local (.7) are kept, of which one agrees; a uniform student has CE ln 4 each.

    kept: (2 ln 4 + c) / 2; batch: (2 ln 4 + c) / 4; each: 2 ln 4 / 2 + c / 1, with c = .407407 * .2180119.
    """
    local = torch.cat([LOCAL, LOCAL, GLOBAL, GLOBAL])
    other = torch.tensor([[0.1, 0.5, 0.3, 0.1]])  # same variance as GLOBAL, but another class
    given = torch.cat([GLOBAL, other, GLOBAL, GLOBAL])
    pulled = 0.0366667 / 0.09 * 0.2180119
    expected = {
        "kept": (2 * math.log(4) + pulled) / 2,
        "batch": (2 * math.log(4) + pulled) / 4,
        "each": math.log(4) + pulled,
    }
    for normalization, value in expected.items():
        step = loss_of(FedLabel(confidence_threshold=0.6, normalization=normalization), given, local)
        assert step.loss.item() == pytest.approx(value, abs=1e-5), normalization
        assert step.examples.item() == 2


def test_kl_target_local_pulls_to_the_local_model_even_if_it_was_selected() -> None:
    """Check 2's sample: KL(local || uniform) = ln 4 - .940448; the weight stays the ratio .407407."""
    step = loss_of(FedLabel(confidence_threshold=0.3, kl_target="local"), GLOBAL, LOCAL)
    assert step.loss.item() == pytest.approx(math.log(4) + 0.4074074 * (math.log(4) - 0.940448), abs=1e-5)


def test_metrics_count_coverage_expert_and_agreement() -> None:
    other = torch.tensor([[0.1, 0.9, 0.0, 0.0]])
    step = loss_of(FedLabel(confidence_threshold=0.6), torch.cat([GLOBAL, other]), torch.cat([LOCAL, LOCAL]))
    assert step.metrics["pseudo/coverage"].tolist() == [2, 2]
    assert step.metrics["pseudo/from_global"].tolist() == [1, 2]
    assert step.metrics["pseudo/agreement"].tolist() == [1, 2]


def test_burn_in_leaves_out_stage_b() -> None:
    recipe = FedLabel(burn_in_rounds=2).recipe(task())
    assert [[phase.name for phase in recipe.phases(r)] for r in (1, 2, 3)] == [
        ["supervised"],
        ["supervised"],
        ["supervised", "unlabeled"],
    ]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("confidence_threshold", 1.5, r"`method.confidence_threshold` \(=1.5\) must lie in \[0, 1\]"),
        ("lambda_0", -1.0, r"`method.lambda_0` \(=-1.0\) must be a finite number of at least 0"),
        ("prox_mu", float("nan"), r"`method.prox_mu` \(=nan\)"),
        ("teacher", "server", r"`method.teacher` \(=server\) must be one of both, local, global"),
        ("burn_in_rounds", -1, r"`method.burn_in_rounds` \(=-1\)"),
        ("unlabeled_steps", -1, r"`method.unlabeled_steps` \(=-1\)"),
    ],
)
def test_wrong_hyper_parameters_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedLabel(**{field: value})


def test_proximal_term_is_the_gradient_of_the_mean_squared_distance() -> None:
    """d/dp [mu * mean((p - p0)^2)] = 2 mu / numel * (p - p0)."""
    phase = FedLabel(prox_mu=10.0).recipe(task()).phases(1)[1]
    assert phase.proximal is not None
    parameter = torch.randn(4, 5, requires_grad=True)
    anchor = torch.randn(4, 5)
    (10.0 * ((parameter - anchor) ** 2).mean()).backward()
    torch.testing.assert_close(parameter.grad, phase.proximal(parameter) * (parameter.detach() - anchor))


# What is not the paper's: calibrated experts and their mixture.


def test_defaults_hold_nothing_out_and_look_at_nothing() -> None:
    supervised, unlabeled = FedLabel().recipe(task()).phases(1)
    assert supervised.loss is labels_loss
    assert supervised.prepare is unlabeled.prepare is None
    assert same(model(train_round(FedLabel(held_out=0.5))), model(train_round(FedLabel())))


def test_calibrated_score_divides_logits_by_each_experts_temperature() -> None:
    """The local model, .7 against .1 thrice, at b = ln 2 / ln 7 has powers 2, 1, 1, 1: .4. The global one stays: .5.

    So the global one is the expert, of which .5 > beta = .45; without calibration it is the local one. Both say class
    0, the weight is .4 / .5, the target the softened local model: KL to the uniform student is ln 4 - H(.4, .2, .2, .2)
    = 1.386294 - 1.332179 = .054115.
    """
    memory = {"global_sharpness": torch.tensor(1.0), "supervised_sharpness": torch.tensor(math.log(2) / math.log(7))}
    method = FedLabel(score="calibrated", confidence_threshold=0.45)
    step = loss_of(method, GLOBAL, LOCAL, memory=memory)
    assert step.pseudo is not None
    assert step.pseudo.from_global.item()
    assert step.pseudo.confidence.item() == pytest.approx(0.5)
    assert step.loss.item() == pytest.approx(math.log(4) + 0.8 * 0.054115, abs=1e-5)
    assert loss_of(replace(method, confidence_threshold=0.55), GLOBAL, LOCAL, memory=memory).examples.item() == 0
    assert not loss_of(FedLabel(), GLOBAL, LOCAL).pseudo.from_global.item()  # type: ignore[union-attr]


def test_mixture_by_hand() -> None:
    """.5 (.1, .6, .2, .1) + .5 (.7, .1, .1, .1) = (.4, .35, .15, .1): class 0, to which the local model gives more.

    The global model says class 1, so it does not agree. At weight .7: (.28, .45, .17, .1), class 1 from the global one.
    """
    other = torch.tensor([[0.1, 0.6, 0.2, 0.1]])
    even = mix(other, LOCAL, torch.tensor(0.5), 0.35, 1.0)
    assert (even.pseudo_label.item(), even.from_global.item(), even.agree.item()) == (0, False, False)
    assert even.confidence.item() == pytest.approx(0.4)
    assert even.keep.item()
    assert not mix(other, LOCAL, torch.tensor(0.5), 0.41, 1.0).keep.item()
    uneven = mix(other, LOCAL, torch.tensor(0.7), 0.35, 1.0)
    assert (uneven.pseudo_label.item(), uneven.from_global.item()) == (1, True)
    assert uneven.confidence.item() == pytest.approx(0.45)
    hard = select(other, LOCAL, 0.35, 2.0)
    assert mix(other, LOCAL, torch.tensor(0.5), 0.35, 2.0).weight.item() == pytest.approx(hard.weight.item())
    step = loss_of(FedLabel(choice="mixture"), other, LOCAL, memory={"global_weight": torch.tensor(0.7)})
    assert step.pseudo is not None
    assert (step.pseudo.label.item(), step.pseudo.from_global.item()) == (1, True)


@pytest.mark.parametrize(("weight", "expert"), [(1.0, GLOBAL), (0.0, LOCAL)])
def test_a_mixture_of_one_is_that_one(weight: float, expert: Tensor) -> None:
    chosen = mix(GLOBAL, LOCAL, torch.tensor(weight), 0.3, 1.0)
    assert chosen.confidence.item() == expert.max().item()
    assert chosen.from_global.item() == (weight == 1)


def test_held_out_samples_are_evenly_spaced_labelled_ones() -> None:
    candidates = sets(*[[0], [0, 1]] * 10, classes=2)  # every second has a label
    assert held_out_samples(candidates, 0.2).nonzero().flatten().tolist() == [8, 18]  # the 5th and the 10th
    assert not held_out_samples(candidates[:8], 0.2).any()  # 4 labels
    assert held_out_samples(candidates, 0.3).sum() == 3
    assert held_out_samples(candidates[:0], 0.3).shape == (0,)


def test_stage_a_leaves_held_out_samples_out() -> None:
    """Labels that are held out may be any: w_L stays as it is; of the others it depends on each."""
    method = FedLabel(score="calibrated", confidence_threshold=1.0)
    data = client(30, 10)
    held = held_out_samples(data.supervision.candidates, 0.2)
    assert held.sum() == 2
    before = model(train_round(method, data))
    data.supervision.candidates[held] = data.supervision.candidates[held].roll(1, 1)
    assert same(model(train_round(method, data)), before)
    data.supervision.candidates[0] = data.supervision.candidates[0].roll(1)
    assert not same(model(train_round(method, data)), before)


def test_calibration_uses_the_held_out_labels_of_each_expert() -> None:
    data, generator = client(30, 20), torch.Generator().manual_seed(1)
    logits = {name: 3 * torch.randn(30, CLASSES, generator=generator) for name in ("global", "supervised")}
    survey = Survey(lambda expert, view: logits[expert], data.supervision, {"other": torch.ones(1)})
    method = FedLabel(score="calibrated", choice="mixture", held_out=0.25)
    memory = method.calibrate(survey).memory
    assert memory is not None
    assert memory.keys() == {"other", "global_sharpness", "supervised_sharpness", "global_weight"}
    rows = [3, 7, 11, 15, 19]
    labels = data.supervision.candidates[rows].int().argmax(1)
    log_likelihood = []
    for name, found in logits.items():
        sharpness = inverse_temperature(found[rows], labels)
        assert memory[f"{name}_sharpness"].item() == sharpness.item()
        log_likelihood.append((found[rows] * sharpness).log_softmax(1)[range(5), labels])
    assert memory["global_weight"].item() == pytest.approx(mixture_weight(*log_likelihood).item())
    assert FedLabel(score="calibrated").calibrate(survey).memory.keys() == {  # type: ignore[union-attr]
        *("other", "global_sharpness", "supervised_sharpness")
    }


@pytest.mark.parametrize("labeled", [20, 3, 0])
@pytest.mark.parametrize("keys", [{"score": "calibrated"}, {"choice": "mixture"}])
def test_a_round_with_calibrated_experts(keys: dict[str, str], labeled: int) -> None:
    """With few labels or none, too; nothing is kept or sent but the model."""
    method = FedLabel(confidence_threshold=0.0, **keys)  # type: ignore[arg-type]
    update = train_round(method, client(30, labeled))
    assert_all_moved(update)
    assert update.kept == update.statistics == {}
    if labeled == 20:
        paper = train_round(FedLabel(confidence_threshold=0.0), client(30, labeled))
        assert not same(model(paper), model(update))


@pytest.mark.parametrize("keys", [{"score": "calibrated"}, {"choice": "mixture"}])
def test_a_stack_with_calibrated_experts_is_each_client_alone(keys: dict[str, str]) -> None:
    recipe = FedLabel(confidence_threshold=0.0, **keys).recipe(task(CLASSES))  # type: ignore[arg-type]
    state, trainer = net().state_dict(), Trainer(net(5), net(6), TRANSFORM, ROUND)
    locals_ = [LocalRound(client(30, labeled), seed, {}) for seed, labeled in enumerate((20, 15, 10))]
    alone = [train_clients(recipe, trainer, state, [each], 1)[0] for each in locals_]
    for found, expected in zip(train_clients(recipe, trainer, state, locals_, 1), alone, strict=True):
        assert found.stacked
        for name, value in model(expected).items():
            torch.testing.assert_close(model(found)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"score": "gini"}, r"`method.score` \(=gini\) must be one of variance, entropy, calibrated"),
        ({"choice": "soft"}, r"`method.choice` \(=soft\) must be one of hard, mixture"),
        ({"held_out": 0.0}, r"`method.held_out` \(=0.0\) must lie in \(0, 1\)"),
        (
            {"choice": "mixture", "teacher": "local"},
            r"`method.choice` \(=mixture\) mixes two .* take method.teacher=both",
        ),
    ],
)
def test_wrong_calibration_is_named(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedLabel(**keys)  # type: ignore[arg-type]
