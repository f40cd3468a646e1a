"""Four nodes over TLS, each registered, with a folder and a kind of label of its own: the weights of the simulation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlabel.cli.data import deployed_config
from fedlabel.config import load_config, to_yaml
from fedlabel.data.labels.supervision import KIND_NAMES
from fedlabel.data.nodes.export import client_folder
from fedlabel.experiment import open_experiment
from server.simulation import simulate
from tests.integration.deployment import NEEDS, PAGE, Federation, federation_of
from tests.integration.test_own_data import FOUR_KINDS, METHODS
from tests.integration.tiny import comparable_metrics, final_weights

pytestmark = NEEDS
NODES = 4
RUNS = {**METHODS, "llp_bp": ("method.name=llp_bp", "method.stage_rounds=1")}
"""Each learns from other labels: of fedlabel only the certain ones, of ill all but the counts, of llp_bp these."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """The folders that `fedlabel partition --export` writes, each at a node of its own."""
    own = [f'data="{{server}}/exported/{client_folder(client)}" client={client}' for client in range(NODES)]
    with federation_of(tmp_path_factory.mktemp("secure") / "federation", own) as made:
        made.set_up()
        options = " ".join(f'"{option}"' for option in FOUR_KINDS)
        made.server.run(f'cd "$FEDERATION/server"\nfedlabel partition {options} --export exported --out partition')
        made.start_nodes()
        yield made


def test_each_node_has_another_kind_of_label() -> None:
    kinds = open_experiment(to_yaml(load_config([], FOUR_KINDS))).federation.kinds()
    found = [[KIND_NAMES[place] for place in np.flatnonzero(row)] for row in kinds]
    assert sorted(found) == [["bag"], ["label", "candidates"], ["noisy label"], ["nothing", "label"]]


@pytest.mark.parametrize("method", RUNS)
def test_the_weights_are_those_of_the_simulation(federation: Federation, tmp_path: Path, method: str) -> None:
    options = [*FOUR_KINDS, *RUNS[method]]
    simulated = simulate((), options, name="simulated", out=tmp_path).path
    server = federation.root / "federation/server"
    config = deployed_config(load_config([], options), server / "exported", held_out=False)
    (server / f"{method}.yaml").write_text(to_yaml(config))
    before = set(server.glob("runs/*"))
    asked = PAGE["5. A run"][0].replace("trial/config.yaml", f"{method}.yaml")
    output = federation.server.run(asked.replace("num_rounds=2", "num_rounds=3"))
    made = set(server.glob("runs/*")) - before
    assert len(made) == 1, output
    (folder,) = made
    assert not (folder / "failures.log").exists()
    ours, theirs = final_weights(folder), final_weights(simulated)
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)
    print(f"{method}: equal to the bit: {all(torch.equal(ours[name], theirs[name]) for name in ours)}")  # noqa: T201
    rows, expected = comparable_metrics(folder), comparable_metrics(simulated)
    assert [row["round"] for row in rows] == [1, 2, 3]
    for row, there in zip(rows, expected, strict=True):
        for name in ("train/loss", "eval/loss", "eval/accuracy"):
            assert row[name] == pytest.approx(there[name], rel=1e-5)
    assert np.sum(np.asarray(rows[-1]["train/client_loss"], dtype=float) > 0) >= NODES - 1  # whose labels it uses
