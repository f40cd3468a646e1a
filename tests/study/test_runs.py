"""Which runs are found, how they are named, and what is refused as not comparable."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fedlabel.study.runs import Comparison, read_comparison
from fedlabel.study.sweep import CompareConfig
from tests.study.runs import make_run, make_sweep


def rows(comparison: Comparison) -> dict[str, dict[str, list[int]]]:
    """Section -> row -> seeds."""
    return {
        name: {row: [run.config.seed for run in runs] for row, runs in section.items()}
        for name, section in comparison.sections.items()
    }


def test_rows_are_named_by_what_differs_within_a_method(tmp_path: Path) -> None:
    """At any depth; in two of three FedLabel rows lambda_0 or the rate differ, supervised has one row."""
    for seed in (1, 0):
        make_run(tmp_path / "deep" / f"a{seed}", f"seed={seed}", "device=cpu", f"data.root=/{seed}")
        make_run(tmp_path / "deep" / "er" / f"b{seed}", f"seed={seed}", "method.lambda_0=0.5")
        make_run(tmp_path / f"s{seed}", f"seed={seed}", "method.name=supervised")
    make_run(tmp_path / "c", "training.lr=0.25")
    make_run(tmp_path / "d", "training.lr=0.25", "strategy.name=FedAdam", "strategy.args.eta=0.01")
    found = rows(read_comparison([tmp_path]))
    (section,) = found.values()
    assert list(found) == ["all"]
    assert {name: seeds for name, seeds in section.items() if name.startswith("sup")} == {"supervised": [0, 1]}
    assert section["fedlabel, lambda_0=1, lr=0.1, strategy.name=weighted_mean, strategy.args={}"] == [0, 1]
    assert section["fedlabel, lambda_0=0.5, lr=0.1, strategy.name=weighted_mean, strategy.args={}"] == [0, 1]
    assert section["fedlabel, lambda_0=1, lr=0.25, strategy.name=FedAdam, strategy.args.eta=0.01"] == [0]


def test_like_with_like(tmp_path: Path) -> None:
    make_run(tmp_path / "runA", "num_rounds=20")
    make_run(tmp_path / "runB", "num_rounds=40", "partition.dirichlet_alpha=0.1")
    for name in "CDEF":
        make_run(tmp_path / f"run{name}", "num_rounds=40", "partition.dirichlet_alpha=0.2", f"seed={ord(name)}")
    with pytest.raises(ValueError, match="compare like with like") as error:
        read_comparison([tmp_path])
    text = str(error.value)
    assert "num_rounds (20: runA; 40: runB, runC, runD and 2 more)" in text
    assert "partition.dirichlet_alpha (0.5: runA; 0.1: runB; 0.2: runC, runD, runE and 1 more)" in text
    assert text.endswith("add --by num_rounds,partition.dirichlet_alpha for one section each.")
    by = ["num_rounds", "partition.dirichlet_alpha"]
    assert rows(read_comparison([tmp_path], by)) == {
        "num_rounds=20, partition.dirichlet_alpha=0.5": {"fedlabel": [0]},
        "num_rounds=40, partition.dirichlet_alpha=0.1": {"fedlabel": [0]},
        "num_rounds=40, partition.dirichlet_alpha=0.2": {"fedlabel": [67, 68, 69, 70]},
    }
    with pytest.raises(ValueError, match=r"differ in partition.dirichlet_alpha .* --by num_rounds,partition.dir"):
        read_comparison([tmp_path], ["num_rounds"])
    with pytest.raises(ValueError, match=r"`--by` names num_round, .* Did you mean num_rounds\?"):
        read_comparison([tmp_path], ["num_round"])


def test_rows_are_named_by_what_differs_in_any_section(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "num_rounds=20", "method.teacher=global")
    make_run(tmp_path / "b", "num_rounds=40")
    assert rows(read_comparison([tmp_path], ["num_rounds"])) == {
        "num_rounds=20": {"fedlabel, teacher=global": [0]},
        "num_rounds=40": {"fedlabel, teacher=both": [0]},
    }
    assert rows(read_comparison([tmp_path], ["num_rounds", "method.teacher"])) == {
        "num_rounds=20, method.teacher=global": {"fedlabel": [0]},
        "num_rounds=40, method.teacher=both": {"fedlabel": [0]},
    }


def test_a_long_value_is_cut_in_the_message(tmp_path: Path) -> None:
    for number, rest in enumerate((0.3, 0.4)):
        mix = f"[{{kind: partial, partial_ratio: 0.25, share: 0.5}}, {{kind: noisy, noise_rate: 0.5, share: {rest}}}]"
        make_run(tmp_path / f"run{number}", f"supervision.mix={mix}")
    with pytest.raises(ValueError, match="compare like with like") as error:
        read_comparison([tmp_path])
    text = str(error.value)
    assert "supervision.mix (..." in text
    assert '"share": 0.3}]: run0; ...' in text
    assert '"share": 0.4}]: run1)' in text
    assert "partial_ratio" not in text
    make_run(tmp_path / "run2")
    with pytest.raises(ValueError, match="compare like with like") as error:
        read_comparison([tmp_path])
    assert '"share": 0.3}]: run0; ...' in str(error.value)
    assert '"share": 0.4}]: run1; []: run2' in str(error.value)


def test_test_and_validation_are_not_mixed(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", "seed=1", "evaluation.split=validation")
    with pytest.raises(ValueError, match=r"evaluation.split \(test: a; validation: b\)"):
        read_comparison([tmp_path])


def test_a_seed_counts_once(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a", "device=cpu"), make_run(tmp_path / "b")
    with pytest.raises(ValueError, match=rf"{first} and {second} are the same row \(fedlabel\) .* seed \(0\)"):
        read_comparison([tmp_path])


def test_unfinished_runs_are_left_out_with_a_warning(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    unfinished = make_run(tmp_path / "b", "seed=1", finished=False)
    comparison = read_comparison([tmp_path / "a", unfinished])
    assert rows(comparison) == {"all": {"fedlabel": [0]}}
    assert comparison.warnings == [f"{unfinished} has not finished and is left out."]
    assert comparison.title == "a, b"
    with pytest.raises(ValueError, match="1 run, none of which has finished"):
        read_comparison([unfinished])


def test_the_baseline_is_the_first_row_that_trains_on_the_labels_alone(tmp_path: Path) -> None:
    """Not the upper bound, which is of the same method, nor the best one."""
    make_run(tmp_path / "a", "method.name=supervised", "method.oracle_labels=true", accuracy=[0.9])
    make_run(tmp_path / "b", "method.name=fixmatch", accuracy=[0.8])
    make_run(tmp_path / "c", "method.name=supervised", "training.prox_mu=0.1", accuracy=[0.4])
    make_run(tmp_path / "d", "method.name=supervised", accuracy=[0.5])
    comparison = read_comparison([tmp_path])
    assert comparison.baseline("all") == "supervised, oracle_labels=false, prox_mu=0.1"
    assert comparison.warnings == []
    pairs = read_comparison([tmp_path], compare=CompareConfig(all_pairs=True))
    assert (pairs.baseline("all"), pairs.warnings) == ("", [])
    named = read_comparison([tmp_path], compare=CompareConfig("fixmatch"))
    assert named.baseline("all") == "fixmatch"


def test_runs_with_fewer_evaluations_in_the_last_tenth_are_named(tmp_path: Path) -> None:
    make_run(tmp_path / "whole", "method.name=supervised", accuracy=[None, None, 0.5, 0.5, 0.5, 0.5, 0.5])
    make_run(tmp_path / "part", accuracy=[0.5, 0.5, 0.5, None, 0.5, None, 0.5])
    (warning,) = read_comparison([tmp_path]).warnings
    assert warning.startswith("1 run without an evaluation in some of the rounds that are averaged")
    assert warning.endswith(f"e.g. {tmp_path / 'part'}: mean of 3 of rounds 3–7.")


def test_rows_of_different_seeds_are_said(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "seed=1")
    make_run(tmp_path / "b", "seed=2", "method.name=supervised")
    (warning,) = read_comparison([tmp_path]).warnings
    assert "the rows have different seeds (fedlabel: 1; supervised: 2)" in warning


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.yaml", "seed: [", "config.yaml is damaged, or of another version"),
        ("config.yaml", "sead: 3", "`sead` is not a configuration key"),
        ("summary.json", "{", "summary.json is damaged"),
        ("summary.json", '{"eval/accuracy": {"last": null}}', "summary.json is damaged"),
        ("metrics.jsonl", "x\n", "metrics.jsonl, line 1 is damaged"),
    ],
)
def test_damage_is_named(file: str, content: str, words: str, tmp_path: Path) -> None:
    (make_run(tmp_path / "a") / file).write_text(content)
    with pytest.raises(ValueError, match=r"a/") as error:
        read_comparison([tmp_path])
    assert words in str(error.value)


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No run \(a folder with config.yaml and metrics.jsonl\) is in"):
        read_comparison([tmp_path])
    with pytest.raises(ValueError, match="nowhere is no folder"):
        read_comparison([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"`--target` \(=60\) must lie in \(0, 1\)"):
        read_comparison([tmp_path], targets=[60])


def test_a_sweep_names_its_rows_and_sections(tmp_path: Path) -> None:
    comparison = read_comparison([make_sweep(tmp_path / "out")])
    assert rows(comparison) == {
        "alpha 0.1": {"labelled only": [0, 1], "FedLabel": [0, 1, 2], "fully <b>labelled</b>": [0, 1, 2]},
        "alpha 1 | mild": {"labelled only": [0, 1, 2], "FedLabel": [1, 2], "fully <b>labelled</b>": [0, 1, 2]},
    }
    assert comparison.title == "out"
    assert comparison.targets == [0.6]
    assert comparison.published == {"alpha 0.1": {"FedLabel": "46.05 ± 1.09"}}
    assert "over 0.1, 0.2 with seed 100 on the validation split" in comparison.protocol
    assert "For FedLabel over 0.01, 0.1." in comparison.protocol
    assert comparison.warnings[:3] == [
        "alpha 0.1 / FedLabel: training.lr=0.1 lies at the edge",
        "alpha 0.1 / labelled only: not finished and left out: seed 2.",
        "alpha 1 | mild / FedLabel: seed 0 failed and is left out: KeyError: 'lost'.",
    ]
    assert read_comparison([tmp_path / "out"], targets=[0.5]).targets == [0.5]


def test_a_sweep_says_what_else_its_rows_differ_in(tmp_path: Path) -> None:
    out = make_sweep(tmp_path / "out")
    assert not any("differ in" in warning for warning in read_comparison([out]).warnings)
    config = out / "0.1" / "0" / "lr0.1-seed0" / "config.yaml"
    config.write_text(config.read_text().replace("num_rounds: 40", "num_rounds: 80"))
    warnings = read_comparison([out]).warnings
    expected = "num_rounds, too (80: labelled only; 40: FedLabel, fully <b>labelled</b>)."
    assert [w for w in warnings if "differ in" in w] == [f"alpha 0.1: the sweep's rows differ in {expected}"]


def test_the_proximal_term_makes_a_row(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "method.name=supervised")
    make_run(tmp_path / "b", "method.name=supervised", "training.prox_mu=0.01")
    found = rows(read_comparison([tmp_path]))
    assert found == {"all": {"supervised, prox_mu=0": [0], "supervised, prox_mu=0.01": [0]}}


def test_a_sweep_stands_alone(tmp_path: Path) -> None:
    out = make_sweep(tmp_path / "out")
    for paths, by in ([out, tmp_path], []), ([out], ["num_rounds"]):
        with pytest.raises(ValueError, match="it must be the only path, without --by"):
            read_comparison(paths, by)
    (out / "sweep.json").write_text('{"sweep": {}}')
    with pytest.raises(ValueError, match=r"sweep.json is damaged, or of an earlier version .*`methods` must name"):
        read_comparison([out])
    make_sweep(tmp_path / "none")
    content = json.loads((tmp_path / "none" / "sweep.json").read_text())
    (tmp_path / "none" / "sweep.json").write_text(json.dumps({**content, "runs": []}))
    with pytest.raises(ValueError, match="No final run of the sweep"):
        read_comparison([tmp_path / "none"])


def test_runs_of_a_method_that_cannot_be_imported_are_compared(tmp_path: Path) -> None:
    for name, width in (("a", 1), ("b", 2)):
        file = make_run(tmp_path / name) / "config.yaml"
        method = f"method:\n  name: absent:Smooth\n  width: {width}\n"
        file.write_text(re.sub(r"^method:\n( .*\n)+", method, file.read_text(), flags=re.MULTILINE))
    (section,) = read_comparison([tmp_path]).sections.values()
    assert list(section) == ["absent:Smooth, width=1", "absent:Smooth, width=2"]
