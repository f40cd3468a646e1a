"""How large a network may be: counted on no device, before any memory is taken for it."""

from __future__ import annotations

import pytest

from fedlabel.models import COPIES, MODELS, ModelConfig, build_model, check_size


@pytest.mark.parametrize("name", MODELS)
def test_counted_without_memory_as_it_is_with(name: str) -> None:
    config = ModelConfig(name=name)
    count = sum(value.numel() for value in build_model(config, (1, 8, 8), 10, 0).parameters())
    memory = COPIES * 4 * count
    check_size(lambda: build_model(config, (1, 8, 8), 10, 0), config, memory)
    with pytest.raises(ValueError, match=f"a network of {count:,} parameters. A run needs 8 times their size"):
        check_size(lambda: build_model(config, (1, 8, 8), 10, 0), config, memory - 1)


@pytest.mark.parametrize("name", MODELS)
def test_the_largest_that_can_be_asked_for_is_counted_and_refused(name: str) -> None:
    """Products of two widths still fit into 64 bits."""
    config = ModelConfig(name=name, width=2**16, hidden=2**20)
    with pytest.raises(ValueError, match=r"`model.width` \(=65536\), `model.hidden` \(=1048576\)"):
        check_size(lambda: build_model(config, (3, 32, 32), 10, 0), config, 2**30)
