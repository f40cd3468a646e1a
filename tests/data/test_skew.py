"""Skew: how long the tails are, and what is done to the images of which client."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlabel.data.skew import (
    FEATURE_SHIFTS,
    SHIFTS,
    Shift,
    SkewConfig,
    client_shift,
    long_tails,
    shift_features,
    shift_images,
    tail_sizes,
)

CLASSES = 5


# ---------------------------------------------------------------------------------------------------------- long tails


def test_tail_is_exponential_from_the_largest_class() -> None:
    """200 * 16^(-c/4) = 200 * 2^-c = 200, 100, 50, 25, 12.5; the last is rounded half up."""
    assert tail_sizes(np.full(5, 200), 16.0).tolist() == [200, 100, 50, 25, 13]


def test_reversed_tail_ends_with_the_largest_class() -> None:
    assert tail_sizes(np.full(5, 200), 16.0, reverse=True).tolist() == [13, 25, 50, 100, 200]


def test_a_class_with_less_than_its_share_keeps_what_it_has() -> None:
    """The largest class is class 1, so the profile is 80 * 2^-c = 80, 40, 20, 10, 5."""
    assert tail_sizes(np.array([7, 80, 20, 0, 30]), 16.0).tolist() == [7, 40, 20, 0, 5]


@pytest.mark.parametrize("counts", [[3, 9, 1, 4], [0, 0], [10**6, 10**6 - 1]])
def test_factor_one_keeps_everything(counts: list[int]) -> None:
    assert tail_sizes(np.array(counts), 1.0).tolist() == counts


def make(n: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, CLASSES, n), rng.random(n) < 0.25


def test_labelled_and_unlabelled_tails_have_factors_of_their_own() -> None:
    labels, labeled = make()
    config = SkewConfig(labeled_imbalance=10, unlabeled_imbalance=100, unlabeled_imbalance_reversed=True)
    kept = long_tails(labels, labeled, CLASSES, config, 0)
    for subset, factor, reverse in ((labeled, 10, False), (~labeled, 100, True)):
        expected = tail_sizes(np.bincount(labels[subset]), factor, reverse)
        assert np.bincount(labels[kept & subset], minlength=CLASSES).tolist() == expected.tolist()
        assert expected.sum() < subset.sum() / 2


def test_one_tail_leaves_the_other_set_alone() -> None:
    labels, labeled = make()
    assert long_tails(labels, labeled, CLASSES, SkewConfig(labeled_imbalance=10), 0)[~labeled].all()
    assert long_tails(labels, labeled, CLASSES, SkewConfig(unlabeled_imbalance=10), 0)[labeled].all()
    assert long_tails(labels, labeled, CLASSES, SkewConfig(), 0).all()


def test_tails_are_drawn_from_the_seed() -> None:
    labels, labeled = make()
    config = SkewConfig(labeled_imbalance=10, unlabeled_imbalance=10)
    one, again, other = (long_tails(labels, labeled, CLASSES, config, seed) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert one.sum() == other.sum()


# ------------------------------------------------------------------------------------------------------- feature shift


def some_images(n: int = 6, channels: int = 1, side: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, side, side), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        ("rotation", -90.0, 90.0),
        ("blur", 0.0, 1.5),
        ("noise", 0.0, 80.0),
    ],
)
def test_amounts_are_uniform_over_clients(kind: str, low: float, high: float) -> None:
    """400 clients of images with side 14 at strength 2: mean (low + high) / 2, its sd (high - low) / sqrt(12 * 400).

    At side 14 the blur of up to 1.5 for 28 pixels is one of up to 0.75, so at strength 2 one of up to 1.5 again.
    """
    config = SkewConfig(feature_shift=kind, feature_shift_strength=2.0)
    amounts = np.array([client_shift(client, 14, config, 0).amount for client in range(400)])
    width = high - low
    assert low <= amounts.min() < low + 0.02 * width
    assert high - 0.02 * width < amounts.max() <= high
    assert abs(amounts.mean() - (low + high) / 2) < 3 * width / np.sqrt(12 * 400)


def test_about_half_of_the_clients_are_inverted() -> None:
    """Of 400 clients 200 are expected, standard deviation 10."""
    kinds = [client_shift(client, 8, SkewConfig(feature_shift="inversion"), 0).kind for client in range(400)]
    assert set(kinds) == {"none", "inversion"}
    assert abs(kinds.count("inversion") - 200) < 30


def test_mixed_gives_each_client_one_of_the_four() -> None:
    """Of 400 clients 100 are expected for each, standard deviation 8.7."""
    config = SkewConfig(feature_shift="mixed")
    kinds = [client_shift(client, 8, config, 0).kind for client in range(400)]
    assert set(kinds) == set(SHIFTS)
    assert all(abs(kinds.count(kind) - 100) < 3 * 8.7 for kind in SHIFTS)
    assert kinds != [client_shift(client, 8, config, 1).kind for client in range(400)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", SHIFTS)
def test_shifted_images_are_images_and_the_originals_stay(kind: str, channels: int) -> None:
    images = some_images(channels=channels)
    before = images.clone()
    shifted = shift_images(images, Shift(kind, 2.0), torch.Generator().manual_seed(0))
    assert (shifted.shape, shifted.dtype) == (images.shape, torch.uint8)
    assert torch.equal(images, before)
    assert not torch.equal(shifted, images)


def test_rotation_turns_counter_clockwise() -> None:
    images = some_images()
    turned = shift_images(images, Shift("rotation", 90.0), torch.Generator())
    assert torch.equal(turned, images.rot90(1, (-2, -1)))


def test_blur_is_a_gaussian_with_its_sd_in_pixels() -> None:
    """A white column becomes 255 * g(x): 255 / (2 sqrt(2 pi)) = 51 at its place, with variance 2^2 but for rounding."""
    image = torch.zeros(1, 1, 31, 31, dtype=torch.uint8)
    image[..., 15] = 255
    row = shift_images(image, Shift("blur", 2.0), torch.Generator())[0, 0, 15].double()
    offsets = torch.arange(-15, 16)
    assert float((row * offsets**2).sum() / row.sum()) == pytest.approx(4.0, abs=0.1)
    assert int(row[15]) == 51


def test_blur_of_no_width_or_more_than_the_image_is_no_failure() -> None:
    images = some_images(side=8)
    assert torch.equal(shift_images(images, Shift("blur", 0.0), torch.Generator()), images)
    wide = shift_images(images, Shift("blur", 50.0), torch.Generator()).float()
    assert wide.std() < images.float().std() / 4


def test_noise_has_its_sd_and_differs_from_image_to_image() -> None:
    grey = torch.full((50, 1, 16, 16), 128, dtype=torch.uint8)
    noise = shift_images(grey, Shift("noise", 10.0), torch.Generator().manual_seed(0)).double() - 128
    assert float(noise.std()) == pytest.approx(10, rel=0.03)
    assert abs(float(noise.mean())) < 0.3
    assert not torch.equal(noise[0], noise[1])


def test_noise_does_not_wrap_around() -> None:
    """Dark pixels stay dark and bright ones bright: at 0 and 255 half of the noise is cut off."""
    generator = torch.Generator().manual_seed(0)
    for value in (0, 255):
        shifted = shift_images(torch.full((9, 1, 8, 8), value, dtype=torch.uint8), Shift("noise", 20.0), generator)
        assert (shifted.int() - value).abs().max() < 100


def test_inversion() -> None:
    images = some_images()
    assert torch.equal(shift_images(images, Shift("inversion", 0.0), torch.Generator()), 255 - images)


@pytest.mark.parametrize("kind", FEATURE_SHIFTS)
def test_each_client_gets_its_own_change_and_nobody_else_any(kind: str) -> None:
    """Client 2 holds nothing, and row 5 belongs to nobody."""
    images = some_images(8)
    before = images.clone()
    parts = [np.array([0, 3, 7]), np.array([1, 2]), np.array([], dtype=np.int64), np.array([4, 6])]
    config = SkewConfig(feature_shift=kind)
    shifted = shift_features(images, parts, config, 0, "train")
    assert torch.equal(images, before)
    assert torch.equal(shifted[5], images[5])
    assert torch.equal(shifted, shift_features(images, parts, config, 0, "train"))
    if kind == "none":
        assert torch.equal(shifted, images)
        return
    assert not torch.equal(shifted, shift_features(images, parts, config, 1, "train"))
    for client, rows in enumerate(parts):
        shift = client_shift(client, 16, config, 0)
        if shift.kind != "noise":
            assert torch.equal(shifted[rows], shift_images(images[rows], shift, torch.Generator()))


def test_a_client_sees_the_same_change_in_training_and_evaluation_with_other_noise() -> None:
    images, parts = some_images(), [np.arange(6)]
    for kind in SHIFTS:
        config = SkewConfig(feature_shift=kind, feature_shift_strength=3.0)
        train, judged = (shift_features(images, parts, config, 0, split) for split in ("train", "evaluation"))
        assert torch.equal(train, judged) == (kind != "noise")


# ------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labeled_imbalance": 0.5}, r"`skew.labeled_imbalance` \(=0.5\) must be a finite number of at least 1"),
        (
            {"unlabeled_imbalance": float("inf")},
            r"`skew.unlabeled_imbalance` \(=inf\) must be a finite number of at least 1: 1 is no long tail",
        ),
        ({"feature_shift": "rotate"}, r"`skew.feature_shift` \(=rotate\) must be one of none, rotation, .*mixed\."),
        ({"feature_shift_strength": 0.0}, r"`skew.feature_shift_strength` \(=0.0\) .*skew.feature_shift=none"),
    ],
)
def test_config_errors(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkewConfig(**changes)


def test_classes_must_fit_the_data() -> None:
    assert SkewConfig().hidden_classes("abcd") == []
    assert SkewConfig(unlabeled_only_classes=("2", "a")).hidden_classes("abcd") == [2, 0]
    assert SkewConfig(unlabeled_only_classes=("2",)).hidden_classes("123") == [1]  # a name, not a place
    for given, message in {
        ("2", "a"): r"`skew.unlabeled_only_classes` \(=\[2, a\]\): 2 is none of the classes a, b, or a number from 0",
        ("a", "b"): r"\(=\[a, b\]\) names all 2 classes, which leaves no label to anyone",
        ("a", "0"): r"names a class twice: a, a\.",
        ("-1",): r"-1 is none of the classes",
    }.items():
        with pytest.raises(ValueError, match=message):
            SkewConfig(unlabeled_only_classes=given).hidden_classes("ab")


def test_list_of_classes_is_kept_as_a_tuple_so_that_it_can_be_hashed() -> None:
    config = SkewConfig(unlabeled_only_classes=[2, 1])  # type: ignore[arg-type]
    assert config.unlabeled_only_classes == ("2", "1")
    assert hash(config) == hash(SkewConfig(unlabeled_only_classes=("2", "1")))


def test_tables_are_not_shifted() -> None:
    rows = torch.randn(6, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    assert shift_features(rows, [np.arange(6)], SkewConfig(), 0, "train") is rows
    for kind in (*SHIFTS, "mixed"):
        with pytest.raises(ValueError, match=rf"`skew.feature_shift` \(={kind}\) is for images; for tables"):
            shift_features(rows, [np.arange(6)], SkewConfig(feature_shift=kind), 0, "train")
