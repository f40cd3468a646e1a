"""Compression as pure functions of tensors: rounding, its bounds and its mean, top-k, and error feedback."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedlabel.compression import (
    INDICES,
    LARGEST_UPDATE,
    SCALES,
    VALUES,
    Codec,
    CompressionConfig,
    flat,
    largest,
    send_update,
)
from fedlabel.config import load_config
from fedlabel.config_text import ConfigError

KINDS = ("none", "float16", "bfloat16", "int8", "top_k")
WEIGHTS = frozenset({"a", "b", "c"})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(seed: int = 0, size: float = 1.0) -> dict[str, Tensor]:
    """A network of three arrays of weights, one of them a number, with two buffers between them."""
    draws = generator(seed)
    return {
        "a": size * torch.randn(7, 5, generator=draws),
        "variance": torch.rand(5, generator=draws),
        "b": size * torch.randn((), generator=draws),
        "batches": torch.tensor(41 + seed),
        "c": 1e-3 * size * torch.randn(60, generator=draws),
    }


def codec(kind: str, share: float = 0.1) -> Codec:
    return Codec(kind, WEIGHTS, share)


def both_ways(kind: str, values: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    return codec(kind).decode(codec(kind).encode(values, generator(seed)), values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("like", [model(), {"variance": torch.rand(3)}, {"a": torch.randn(4).double()}])
def test_form_is_that_of_what_is_encoded(kind: str, like: dict[str, Tensor]) -> None:
    form, arrays = codec(kind).form(like), codec(kind).encode(like, generator())
    assert [(n, v.dtype, v.shape) for n, v in form.items()] == [(n, v.dtype, v.shape) for n, v in arrays.items()]
    decoded = codec(kind).decode(arrays, like)
    assert [(n, v.dtype, v.shape) for n, v in decoded.items()] == [(n, v.dtype, v.shape) for n, v in like.items()]


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_travel_as_they_are(kind: str) -> None:
    values, start = model(1), model(0)
    assert both_ways(kind, values)["variance"] is values["variance"]
    sent = send_update(codec(kind), values, start, generator())
    for name in ("variance", "batches"):
        assert torch.equal(sent.model[name], values[name])
        assert torch.equal(sent.arrays[name], values[name])


@pytest.mark.parametrize("kind", KINDS)
def test_server_decodes_the_model_that_the_client_knows(kind: str) -> None:
    start, end = model(0), model(1)
    sent = send_update(codec(kind), end, start, generator())
    decoded = codec(kind).model(sent.arrays, start)
    assert list(decoded) == list(start)
    assert all(torch.equal(decoded[name], sent.model[name]) for name in start)


def test_nothing_changes_without_compression() -> None:
    end = model(1)
    sent = send_update(codec("none"), end, model(0), generator(), torch.ones(96))
    assert sent.arrays is sent.model is end
    assert sent.residual is None


@pytest.mark.parametrize(("kind", "unit"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_floats_are_off_by_half_a_unit_in_the_last_place(kind: str, unit: float) -> None:
    values = {"a": torch.randn(100_000, generator=generator())}
    error = (both_ways(kind, values)["a"] - values["a"]).abs()
    assert (error <= unit * values["a"].abs() + 2**-25).all()  # float16's smallest step is 2^-24
    assert error.max() > unit / 4
    again = both_ways(kind, both_ways(kind, values))
    assert torch.equal(again["a"], both_ways(kind, values)["a"])


def test_bfloat16_is_its_bit_pattern() -> None:
    arrays = codec("bfloat16").encode({"a": torch.tensor([1.0, -2.0, 0.0])}, generator())
    assert arrays["a"].tolist() == [0x3F80, 0xC000 - 2**16, 0]


def test_finite_numbers_stay_finite_in_float16() -> None:
    assert both_ways("float16", {"a": torch.tensor([1e6, -1e6])})["a"].tolist() == [65504.0, -65504.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_other_side_sees_what_is_not_finite(kind: str, value: float) -> None:
    values = model()
    values["a"][2, 3] = value
    assert not both_ways(kind, values)["a"].isfinite().all()


def test_int8_is_within_a_step() -> None:
    values = model()
    found = both_ways("int8", values)
    for name in WEIGHTS:
        assert ((found[name] - values[name]).abs() <= values[name].abs().max() / 127 * (1 + 1e-5)).all()
        top = values[name].abs().flatten().argmax()  # the largest is hit
        torch.testing.assert_close(found[name].flatten()[top], values[name].flatten()[top])


def test_int8_is_unbiased() -> None:
    """The mean over 2,000 draws: each number is off by a step s at most, so that the mean's standard deviation is at
    most s / 2 / sqrt(2000); one of 35 exceeds 4.5 of these in one of 4,000 such tests.
    """
    values = {"a": torch.randn(35, generator=generator())}
    mean = torch.stack([both_ways("int8", values, seed)["a"] for seed in range(2000)]).double().mean(0)
    step = float(values["a"].abs().max()) / 127
    assert ((mean - values["a"]).abs() <= 4.5 * step / 2 / 2000**0.5).all()
    once = (both_ways("int8", values)["a"] - values["a"]).abs().max()
    assert once > 0.5 * step  # nearest rounding is never so far off


def test_int8_is_a_function_of_the_generator() -> None:
    values = model()
    assert torch.equal(both_ways("int8", values, 3)["a"], both_ways("int8", values, 3)["a"])
    assert not torch.equal(both_ways("int8", values, 3)["a"], both_ways("int8", values, 4)["a"])


def test_int8_does_not_overflow() -> None:
    """127 + 0.99999994 is 128 as a float32, which would be -128 as an int8: of two million draws some come so near."""
    values = {"a": torch.ones(2_000_000)}
    assert codec("int8").encode(values, generator())["a"].unique().tolist() == [127]


@pytest.mark.parametrize("values", [torch.zeros(5), torch.zeros(0), torch.tensor([1e-45, -1e-45, 0.0])])
def test_int8_of_nothing_is_nothing(values: Tensor) -> None:
    found = codec("int8").encode({"a": values}, generator())
    assert found[SCALES].isfinite().all()
    assert torch.equal(both_ways("int8", {"a": values})["a"], torch.zeros_like(values))


@pytest.mark.parametrize("share", [1e-6, 0.03, 0.5, 1.0])
def test_top_k_against_sorting(share: float) -> None:
    values, way = model(), codec("top_k", share)
    numbers = [float(x) for name in ("a", "b", "c") for x in values[name].flatten()]
    count = max(1, round(share * len(numbers)))
    chosen = sorted(sorted(range(len(numbers)), key=lambda i: (-abs(numbers[i]), i))[:count])
    arrays = way.encode(values, generator())
    assert arrays[INDICES].tolist() == chosen
    assert arrays[VALUES].tolist() == [numbers[i] for i in chosen]
    expected = [x if i in chosen else 0.0 for i, x in enumerate(numbers)]
    assert flat(way.decode(arrays, values), ["a", "b", "c"]).tolist() == expected


def test_of_equal_numbers_the_first_are_largest() -> None:
    assert largest(torch.tensor([1.0, -2.0, 1.0, 2.0, -1.0]), 3).tolist() == [0, 1, 3]
    assert largest(torch.zeros(4), 2).tolist() == [0, 1]
    assert largest(torch.tensor([1.0, torch.nan, 5.0, -torch.inf]), 2).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("numbers", "dtype"),
    [(256, torch.uint8), (257, torch.uint16), (2**16, torch.uint16), (2**16 + 1, torch.uint32)],
)
def test_positions_are_of_the_smallest_type(numbers: int, dtype: torch.dtype) -> None:
    values = {"a": torch.zeros(numbers)}
    values["a"][-1] = 1
    way = Codec("top_k", WEIGHTS, 1 / numbers)
    arrays = way.encode(values, generator())
    assert arrays[INDICES].dtype == dtype
    assert arrays[INDICES].tolist() == [numbers - 1]
    assert torch.equal(way.decode(arrays, values)["a"], values["a"])


def test_error_feedback_telescopes() -> None:
    """What was sent in all rounds, and what is kept, are all updates."""
    way, residual = codec("top_k", 0.05), torch.zeros(96)
    sent, updates = torch.zeros(96), torch.zeros(96)
    for number in range(30):
        start, end = model(number), model(number + 100)
        found = send_update(way, end, start, generator(), residual)
        assert found.residual is not None
        residual = found.residual
        sent += flat(way.decode(found.arrays, start), ["a", "b", "c"])
        updates += flat(end, ["a", "b", "c"]) - flat(start, ["a", "b", "c"])
    torch.testing.assert_close(sent + residual, updates, rtol=1e-5, atol=1e-5)
    assert (residual != 0).sum() > 80
    assert (sent - updates).abs().max() > 0.1  # without what is kept they are not


def test_without_error_feedback_nothing_is_kept() -> None:
    start, end = model(0), model(1)
    found = send_update(codec("top_k"), end, start, generator())
    assert found.residual is None
    changed = sum(int((found.model[name] != start[name]).sum()) for name in WEIGHTS)
    assert changed == codec("top_k").sent(96) == 10


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 2 * LARGEST_UPDATE])
def test_a_training_that_diverged_does_not_spoil_what_is_kept(value: float) -> None:
    end, residual = model(1), torch.ones(96)
    end["a"][0, 0] = value
    found = send_update(codec("top_k"), end, model(0), generator(), residual)
    assert found.residual is residual


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["compression.up=zip"], "`compression.up` .=zip. must be one of none, float16, bfloat16, int8, top_k"),
        (["compression.down=top_k"], "`compression.down` .=top_k. must be one of none, float16, bfloat16, int8"),
        (["compression.up=top_k"], "`compression.share` must be given"),
        (["compression.up=top_k", "compression.share=0"], r"`compression.share` .=0. must lie in \(0, 1\]"),
        (["compression.up=int8", "compression.share=0.1"], "`compression.share` .=0.1. has an effect with"),
        (["compression.error_feedback=true"], "`compression.error_feedback` .=true. has an effect with"),
        (["quantization=8"], "Did you mean compression.up or compression.down"),
        (["sparsity=0.9"], "Did you mean compression.share"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([], options)


def test_compression_is_off_by_default() -> None:
    assert load_config([]).compression == CompressionConfig("none", "none", None, False)
