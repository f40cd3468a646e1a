"""SemiFL: what is labelled once a round, the fixed and the mixed batch against derivations per sample, and limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedlabel.data.labels.supervision import Supervision
from fedlabel.learning.client import ClientData, ClientUpdate, Trainer, train_client, train_server
from fedlabel.learning.plan import draw_batches
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods.batch import Batch, StateDict, Survey
from fedlabel.methods.recipe import BySample, Method, Recipe
from fedlabel.methods.semifl import SemiFL
from fedlabel.methods.uploads import PhaseResult
from fedlabel.seeding import numpy_generator, torch_generator
from tests.methods.batches import certain_part
from tests.methods.recipes import task
from tests.methods.rounds import TRANSFORM
from tests.methods.tables import CLASSES, NOTHING, ROUND, LabelsOnly, best, client, model, net, same, softmax

SEEDS = range(5)
SEED = 7


def read(images: Tensor) -> Tensor:
    """A student whose logits are the pixels."""
    return images.flatten(1)


def make_batch(
    labeled: Tensor,
    labels: Tensor,
    views: tuple[Tensor, Tensor],
    given: Tensor,
    mix: tuple[Tensor, Tensor],
    share: float,
) -> Batch:
    """Rows (n, classes) of pixels; `views` are weak and strong, `mix` is the other sample's weak view and its label."""
    classes = labeled.shape[1]
    unknown = torch.ones(len(given), classes, dtype=torch.bool)

    def image(rows: Tensor) -> Tensor:
        return rows.view(len(rows), 1, 1, -1)

    return Batch(
        labeled=certain_part({"weak": image(labeled)}, labels[:, None] == torch.arange(classes), {}),
        unlabeled=certain_part({"weak": image(views[0]), "strong": image(views[1])}, unknown, {"label": given}),
        mix=certain_part({"weak": image(mix[0])}, unknown, {"label": mix[1]}),
        mixing=torch.tensor(share),
        memory={},
    )


def random_batch(seed: int, share: float, n: int = 5) -> tuple[Batch, dict[str, Tensor]]:
    """A batch and its pieces, all of four classes; three labelled samples."""
    generator = torch.Generator().manual_seed(seed)
    rows = {name: 2 * torch.randn(n, 4, generator=generator) for name in ("weak", "strong", "other")}
    rows["labeled"] = 2 * torch.randn(3, 4, generator=generator)
    for name in rows:
        rows[name].requires_grad_()
    y = {name: torch.randint(4, (k,), generator=generator) for name, k in (("y", 3), ("given", n), ("mixed", n))}
    views, mix = (rows["weak"], rows["strong"]), (rows["other"], y["mixed"])
    return make_batch(rows["labeled"], y["y"], views, y["given"], mix, share), rows | y


def cross_entropy(logits: Sequence[float], label: int) -> float:
    return -math.log(softmax(torch.tensor(logits, dtype=torch.float64))[label])


# The equations.


def test_loss_by_hand() -> None:
    """Two classes, logits (x, 0), so p_0 = 1 / (1 + e^-x).

    Labelled: x = 0: ln 2 = .693147. Fixed: strong view x = ln 3, y = 0: -ln .75 = .287682.
    Mixed, s = .75: x = .75 ln 3 - .25 ln 3 = .549306, p_0 = sqrt 3 / (1 + sqrt 3) = .633975; y = 0 with weight .75,
    y' = 1 with .25: .75 * .455746 + .25 * 1.005053 = .593073. Sum 1.573902; with lambda_mix = .5: 1.277365.
    """
    one, two = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[-math.log(3), 0.0]])
    zero, first, second = torch.zeros(1, 2), torch.tensor([0]), torch.tensor([1])
    batch = make_batch(zero, first, (one, one), first, (two, second), 0.75)
    step = SemiFL().loss(read, NOTHING, batch)
    assert step.loss.item() == pytest.approx(1.573902, abs=1e-6)
    assert step.examples.item() == 2
    assert step.metrics["train/loss_supervised"].tolist() == pytest.approx([0.693147, 1])
    assert step.metrics["train/loss_unsupervised"].tolist() == pytest.approx([0.287682, 1])
    assert step.metrics["train/loss_mix"].tolist() == pytest.approx([0.593073, 1])
    assert step.metrics["train/loss"].tolist() == pytest.approx([1.573902, 1])
    half = SemiFL(lambda_mix=0.5).loss(read, NOTHING, batch)
    assert half.loss.item() == pytest.approx(1.277365, abs=1e-6)
    without = SemiFL(lambda_mix=0.0).loss(read, NOTHING, batch)
    assert without.loss.item() == pytest.approx(0.693147 + 0.287682, abs=1e-6)
    assert "train/loss_mix" not in without.metrics


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_loss_and_gradient_per_sample(seed: int, share: float) -> None:
    """Logits are pixels: the mixed ones' gradient s (p - y) + (1 - s) (p - y') reaches x times s and x' times 1 - s."""
    batch, rows = random_batch(seed, share)
    step = SemiFL(lambda_mix=0.6).loss(read, NOTHING, batch)
    names = ("labeled", "strong", "weak", "other")
    gradients = dict(zip(names, torch.autograd.grad(step.loss, [rows[name] for name in names]), strict=True))
    plain = {name: value.tolist() for name, value in rows.items()}
    total = sum(cross_entropy(row, y) for row, y in zip(plain["labeled"], plain["y"], strict=True)) / 3
    for i in range(5):
        given, mixed_label = plain["given"][i], plain["mixed"][i]
        mixed = [share * a + (1 - share) * b for a, b in zip(plain["weak"][i], plain["other"][i], strict=True)]
        total += cross_entropy(plain["strong"][i], given) / 5
        both = share * cross_entropy(mixed, given) + (1 - share) * cross_entropy(mixed, mixed_label)
        total += 0.6 * both / 5
        strong, p = softmax(rows["strong"][i]), softmax(torch.tensor(mixed))
        expected = [(strong[c] - (c == given)) / 5 for c in range(4)]
        pulled = [0.6 * (p[c] - share * (c == given) - (1 - share) * (c == mixed_label)) / 5 for c in range(4)]
        assert gradients["strong"][i].tolist() == pytest.approx(expected, abs=1e-6)
        assert gradients["weak"][i].tolist() == pytest.approx([share * value for value in pulled], abs=1e-6)
        assert gradients["other"][i].tolist() == pytest.approx([(1 - share) * value for value in pulled], abs=1e-6)
    assert step.loss.item() == pytest.approx(total, abs=1e-5)
    assert step.examples.item() == 3 + 5


@pytest.mark.parametrize("seed", SEEDS)
def test_mixing_one_leaves_the_other_sample_out(seed: int) -> None:
    """s = 1: the mixed term is CE(y, weak(x)), whatever x' and y' are; s = 0: CE(y', weak(x'))."""
    batch, rows = random_batch(seed, 1.0)
    other = batch._replace(mix=random_batch(seed + 100, 1.0)[0].mix)
    step = SemiFL().loss(read, NOTHING, batch)
    assert torch.equal(step.loss, SemiFL().loss(read, NOTHING, other).loss)
    without = SemiFL(lambda_mix=0.0).loss(read, NOTHING, batch).loss
    weak = torch.nn.functional.cross_entropy(rows["weak"], rows["given"])
    torch.testing.assert_close(step.loss, without + weak)
    reverse = SemiFL().loss(read, NOTHING, batch._replace(mixing=torch.tensor(0.0))).loss
    torch.testing.assert_close(reverse, without + torch.nn.functional.cross_entropy(rows["other"], rows["mixed"]))


def test_prepare_labels_everything_and_draws_the_sure() -> None:
    """p = .95 reaches the threshold, .94 does not, but has a label to be mixed in with; labels of known ones are as
    the model says, too: they are never drawn as unlabelled unless `unlabeled_includes_labeled`."""
    probs = torch.tensor([[0.94, 0.06], [0.05, 0.95], [0.96, 0.04], [0.5, 0.5]])
    asked = []

    def predict(teacher: str, view: str) -> Tensor:
        asked.append((teacher, view))
        return probs.double().log()

    prepared = SemiFL(confidence_threshold=0.9499).prepare(
        Survey(predict, Supervision.certain(torch.ones(4, 2, dtype=torch.bool)), {})
    )
    assert asked == [("global", "clean")]
    assert prepared.draw is not None
    assert prepared.pseudo is not None
    assert prepared.draw.tolist() == prepared.pseudo.keep.tolist() == [False, True, True, False]
    assert prepared.targets["label"].tolist() == [0, 1, 0, 0]
    assert prepared.pseudo.confidence.tolist() == pytest.approx([0.94, 0.95, 0.96, 0.5])
    assert prepared.pseudo.from_global.all()
    inclusive = SemiFL(confidence_threshold=0.5).prepare(
        Survey(lambda teacher, view: torch.zeros(1, 2), Supervision.certain(torch.ones(1, 2, dtype=torch.bool)), {})
    )
    assert inclusive.draw is not None
    assert inclusive.draw.tolist() == [True]


@pytest.mark.parametrize("seed", SEEDS)
def test_prepare_per_sample(seed: int) -> None:
    logits = 3 * torch.randn(50, 4, generator=torch.Generator().manual_seed(seed))
    survey = Survey(lambda teacher, view: logits, Supervision.certain(torch.ones(50, 4, dtype=torch.bool)), {})
    prepared = SemiFL(confidence_threshold=0.8).prepare(survey)
    assert prepared.draw is not None
    expected = [best(softmax(row)) for row in logits]
    assert prepared.targets["label"].tolist() == [label for _, label in expected]
    assert prepared.draw.tolist() == [confidence >= 0.8 for confidence, _ in expected]
    assert 5 < prepared.draw.sum() < 50


def recipe_of(method: Method) -> Recipe:
    return method.recipe(task(CLASSES))


def test_phases_and_their_mixing() -> None:
    supervised, train = recipe_of(SemiFL(mix_alpha=0.4)).phases(1)
    assert (supervised.name, supervised.start, supervised.draw) == ("supervised", "global", BySample(("weak",)))
    assert (train.start, train.teachers) == ("supervised", ("global",))
    assert train.draw == BySample(("weak",), ("weak", "strong"), mix=("weak",), mix_alpha=0.4)
    without = recipe_of(SemiFL(lambda_mix=0.0)).phases(1)[1].draw
    assert isinstance(without, BySample)
    assert without.mix == ()
    assert SemiFL().mix_alpha == 0.75


def test_the_mean_is_uniform_over_the_clients_that_trained() -> None:
    """One model, the end of the second phase (it holds the first's step), with weight 1; 0 where nothing was used."""
    start = {"w": torch.tensor(0.0)}
    first = PhaseResult("supervised", {"w": torch.tensor(1.0)}, 20)
    second = PhaseResult("train", {"w": torch.tensor(1.5)}, 30, "supervised")
    send = recipe_of(SemiFL()).upload.send
    sent = send(start, [first, second], frozenset({"w"}), 50.0)
    assert sent == {"model": ({"w": torch.tensor(1.5)}, 1.0)}
    assert send(start, [], frozenset({"w"}), 0.0) == {"model": (start, 0.0)}


# Rounds.


def received(scale: float = 8.0) -> StateDict:
    """Weights of some mind: the largest probabilities of `client()`'s images spread from .4 to .8."""
    return {name: scale * value for name, value in net().state_dict().items()}


def train_round(
    method: Method, data: ClientData | None = None, state: StateDict | None = None, config: TrainingConfig = ROUND
) -> ClientUpdate:
    trainer = Trainer(net(5), net(6), TRANSFORM, config)
    start = received() if state is None else state
    return train_client(recipe_of(method), trainer, start, client() if data is None else data, 1, SEED)


def moved(update: ClientUpdate) -> set[str]:
    return {name for name, value in received().items() if not torch.equal(value, model(update)[name])}


ALL = {"1.weight", "1.bias", "3.weight", "3.bias"}
TAU = 0.55
"""Some of the samples of `client()` are sure of it."""


def believed(data: ClientData) -> tuple[Tensor, Tensor]:
    """The received model's largest probability and class on every clean image."""
    with torch.no_grad():
        probs = torch.func.functional_call(net(), received(), (data.images.float() / 255,)).softmax(-1)
    return probs.max(-1).values, probs.argmax(-1)


def test_a_round_labels_once_with_the_received_model_although_it_trained_on_labels_before() -> None:
    data = client()
    update = train_round(SemiFL(confidence_threshold=TAU), data)
    confidence, label = believed(data)
    assert update.pseudo is not None
    assert update.pseudo_index.tolist() == list(range(10, 30))  # every unlabelled sample once, not once a step
    assert torch.equal(update.pseudo.label, label[10:])
    assert torch.equal(update.pseudo.keep, confidence[10:] >= TAU)
    torch.testing.assert_close(update.pseudo.confidence, confidence[10:])
    kept = int(update.pseudo.keep.sum())
    assert 4 <= kept < 20
    assert update.sums["pseudo/coverage"] == [kept, 20]
    assert update.sums["train/loss_unsupervised"][1] == update.sums["train/loss_mix"][1] == 5 * 4
    assert moved(update) == ALL
    assert update.parts["model"].weight == 1
    # Passes: 30 of the teacher; 5 * 4 of the student on labels; 5 * (4 + 4 + 4) on labelled, strong and mixed ones.
    assert (update.forward, update.backward) == (30 + 20 + 60, 20 + 60)


def test_a_batch_written_out() -> None:
    """One step of the second phase, alone: no label at the client, the batch is all there is of sure samples.

    The mixing weight is this round's first draw of Beta(.75, .75); what is mixed in is known from the seed, too.
    """
    data = client(20, 0)
    config = replace(ROUND, batch_size=64, local_steps=1)
    update = train_round(SemiFL(confidence_threshold=TAU), data, config=config)
    confidence, label = believed(data)
    sure = (confidence >= TAU).nonzero().squeeze(1)
    (drawn,) = draw_batches(sure, 64, 1, torch_generator(SEED, "train", "unlabeled"))
    (other,) = draw_batches(torch.arange(20), len(sure), 1, torch_generator(SEED, "train", "mix"))
    share = numpy_generator(SEED, "train", "mixing").beta(0.75, 0.75)
    assert sorted(drawn.tolist()) == sure.tolist()
    assert not set(other.tolist()) <= set(sure.tolist())  # also samples that are not sure
    images = data.images.float() / 255
    reference = net()
    reference.load_state_dict(received())
    loss = torch.zeros(())
    for i, j in zip(drawn.tolist(), other.tolist(), strict=True):
        strong, mixed = images[i].flip(-1), share * images[i] + (1 - share) * images[j]
        log_strong, log_mixed = reference(torch.stack([strong, mixed])).log_softmax(-1)
        loss = loss - log_strong[label[i]] - share * log_mixed[label[i]] - (1 - share) * log_mixed[label[j]]
    (loss / len(drawn)).backward()
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(model(update)[name], parameter.detach() - 0.2 * parameter.grad, atol=1e-5, rtol=1e-5)


def test_without_mixing_the_unsure_play_no_role_with_it_they_do() -> None:
    """Unsure samples become copies of one of them, so all stay unsure."""
    data = client()
    confidence, _ = believed(data)
    unsure = (confidence < TAU) & (torch.arange(30) >= 10)
    images = data.images.clone()
    images[unsure] = data.images[unsure][:1]
    other = ClientData(images, data.supervision)
    for lambda_mix, equal in ((0.0, True), (1.0, False)):
        method = SemiFL(confidence_threshold=TAU, lambda_mix=lambda_mix)
        assert same(model(train_round(method, other)), model(train_round(method, data))) == equal


@pytest.mark.parametrize("lambda_mix", [0.0, 1.0])
def test_without_a_sure_sample_a_round_is_two_on_labels_one_after_the_other(lambda_mix: float) -> None:
    for data, method in (
        (client(), SemiFL(confidence_threshold=1.0, lambda_mix=lambda_mix)),
        (client(10, 10), SemiFL(confidence_threshold=0.0, lambda_mix=lambda_mix)),  # nothing unlabelled at all
    ):
        first = model(train_round(LabelsOnly(phase="supervised"), data))
        expected = model(train_round(LabelsOnly(), data, first))
        update = train_round(method, data)
        assert same(model(update), expected)
        assert not same(first, expected)
        assert update.pseudo is None or not update.pseudo.keep.any()
        assert update.parts["model"].weight == 1


def test_labels_at_the_server() -> None:
    """The server moves the model; a client trains on its sure samples with weight 1, and sits out without one."""
    trainer = Trainer(net(5), net(6), TRANSFORM, ROUND)
    trained = train_server(recipe_of(SemiFL()), trainer, received(), client(10, 10), SEED)
    assert not any(torch.equal(trained[name], value) for name, value in received().items())
    sure = train_round(SemiFL(confidence_threshold=TAU), client(20, 0))
    assert moved(sure) == ALL
    assert sure.parts["model"].weight == 1
    unsure = train_round(SemiFL(confidence_threshold=1.0), client(20, 0))
    assert same(model(unsure), received())
    assert unsure.parts["model"].weight == 0
    assert unsure.pseudo is not None
    assert len(unsure.pseudo.keep) == 20  # counted in the coverage all the same


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("confidence_threshold", 1.5, r"`method.confidence_threshold` \(=1.5\) must lie in \[0, 1\]"),
        ("confidence_threshold", float("nan"), r"`method.confidence_threshold` \(=nan\)"),
        ("mix_alpha", 0.0, r"`method.mix_alpha` \(=0.0\) must be a positive number"),
        ("mix_alpha", float("inf"), r"`method.mix_alpha` \(=inf\)"),
        ("lambda_mix", -1.0, r"`method.lambda_mix` \(=-1.0\) must be a finite number of at least 0"),
        ("lambda_mix", float("nan"), r"`method.lambda_mix` \(=nan\)"),
    ],
)
def test_wrong_hyper_parameters_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SemiFL(**{field: value})
