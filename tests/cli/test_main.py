"""The command line: exit status, one message for a user's error, nothing left behind, and what success leaves."""

from __future__ import annotations

import ast
import importlib.metadata
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

import fedlabel
from fedlabel.cli.main import app
from fedlabel.cli.progress import make_table
from fedlabel.config import load_config
from fedlabel.data.sets.datasets import load_dataset
from server.checkpoint import load_checkpoint
from tests.data.arrays import write_npz
from tests.integration.processes import environment, fedlabel_command
from tests.integration.tiny import TINY, run_tiny

SMALL = [*TINY, "num_rounds=2"]


def call(*arguments: str) -> Result:
    """Calls `fedlabel ...` in this process."""
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def assert_refused(result: Result, *words: str) -> None:
    """Exit status 2, and on stderr one line that holds all `words`."""
    assert result.exit_code == 2, (result.output, result.exception)
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    for word in words:
        assert word in line
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["training.lrr=1"], ["`training.lrr` is not a configuration key", "mean training.lr?"]),
        (["trainin.lr=1"], ["`trainin` is not a configuration key", "Did you mean training?"]),
        (["training.lr=fast"], ["`training.lr`", "(=fast)", "must be a number"]),
        (["num_rounds=many"], ["`num_rounds` (=many)"]),
        (["num_rounds=0"], ["`num_rounds` (=0)", "at least 1"]),
        (["fraction_train=1.5"], ["`fraction_train` (=1.5)", "(0, 1]"]),
        (["method.confidence_threshold=1.5"], ["`method.confidence_threshold` (=1.5)", "[0, 1]"]),
        (["method.name=fedlable"], ["fedlable", "fedlabel"]),
        (["data.name=digitz"], ["`data.name` (=digitz)", "digits"]),
        (["strategy.name=FedAdams"], ["`strategy.name` (=FedAdams)", "FedAdam"]),
        (["strategy.name=FedAdam", "strategy.args.etaa=1"], ["`strategy.args`", "etaa", "eta"]),
        (["grid.kind=rays"], ["`grid.kind` (=rays)", "in_process, ray"]),
        (["device=cuda:77"], ["`device` (=cuda:77)", "device=auto or cpu"]),
        (["device=tpu"], ["`device` (=tpu)", "auto, cpu, cuda"]),
        (["data.name=breast_cancer"], ["`model.name` (=cnn)", "rows of a table", "model.name=mlp"]),
        (["data.name=breast_cancer", "model.name=mlp", "augment.flip=true"], ["`augment.flip` (=True)", "for images"]),
        (["data.name=breast_cancer", "model.name=mlp", "skew.feature_shift=blur"], ["`skew.feature_shift` (=blur)"]),
        (["data.name=adult", "data.root=/nonexistent"], ["adult.data.gz", "/nonexistent/tabular/adult", "data.root"]),
        (
            [
                "data.positive_classes=[8]",
                "supervision.kind=noisy",
                "supervision.noise=asymmetric",
                "supervision.noise_rate=0.3",
            ],
            ["`supervision.noise` (=asymmetric)", "digits (8 against the rest)"],
        ),
        (["data.name=cifar10", "data.root=/nonexistent"], ["/nonexistent", "data.root", "data.download=true"]),
        (["num_clients=5000"], ["`num_clients` (=5000)", "training samples"]),
        (
            ["num_clients=700", "partition.min_samples=50"],
            ["`num_clients`", "`partition.min_samples`", "35000 samples"],
        ),
        (
            ["partition.kind=classes_per_client", "partition.classes_per_client=50"],
            ["`partition.classes_per_client` (=50)", "10"],
        ),
        (["supervision.labels_per_class=5000"], ["`supervision.labels_per_class` (=5000)"]),
        (["=3"], ["`=3`", "key=value"]),
        (["no_such_file.yaml"], ["no_such_file.yaml does not exist", "looked at"]),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value[0], str) and "=" in value[0] else "",
)
def test_bad_input_is_one_message_and_leaves_nothing(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "runs"
    assert_refused(call("run", *arguments, "--name", "a", "--out", str(out)), *words)
    assert not out.exists()


def test_corrupt_npz_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.npz"
    images, labels = np.zeros((40, 8, 8), np.uint8), np.arange(40) % 4
    np.savez(file, x_train=images, y_train=labels, x_test=images, y_test=labels)
    file.write_bytes(file.read_bytes()[:-300])
    result = call("run", "data.name=npz", f"data.root={file}", "--name", "a", "--out", str(tmp_path / "runs"))
    assert_refused(result, str(file), "cannot be read", "Write it again")
    assert not (tmp_path / "runs").exists()


def test_unreadable_yaml_is_named(tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("training: {lr: 0.1")
    result = call("run", str(file), "--name", "a", "--out", str(tmp_path / "runs"))
    assert result.exit_code == 2
    assert f"Error: {file} is not readable YAML" in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made by the command."""
    out = tmp_path_factory.mktemp("cli") / "runs"
    result = call("run", *SMALL, "--name", "done", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "round 2/2  pseudo-labels  accuracy 0." in result.output  # line-wise: this is no terminal
    assert "finished before" not in result.output
    assert "selected" not in result.output
    assert f"fedlabel tensorboard {out}" in result.output
    return out / "done"


def test_success_leaves_the_promised_summary(done: Path) -> None:
    summary = json.loads((done / "summary.json").read_text())
    promised = {"eval/accuracy", "rounds", "seed", "seconds", "method", "dataset", "commit", "versions", "hardware"}
    assert promised | {"comm/bytes_up", "comm/bytes_down"} <= set(summary)
    assert set(summary["eval/accuracy"]) == {"last", "best", "mean_last_tenth"}
    assert (summary["rounds"], summary["seed"], summary["method"]) == (2, 0, "fedlabel")
    assert summary["comm/bytes_up"] > 0
    assert summary["comm/bytes_down"] > 0
    names = {path.name for path in done.iterdir()}
    assert {"config.yaml", "partition.json", "partition.png", "metrics.jsonl", "checkpoints"} <= names


def test_resuming_a_finished_run_says_that_nothing_was_left(done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in [done, *done.rglob("*")]}
    result = call("run", "--resume", "--name", "done", "--out", str(done.parent))
    assert result.exit_code == 0, result.output
    assert "This run was finished before" in result.output
    assert "round 2/2" not in result.output
    assert {path: path.stat().st_mtime_ns for path in [done, *done.rglob("*")]} == before


def test_resuming_a_finished_run_mends_its_summary(done: Path) -> None:
    summary = done / "summary.json"
    good = json.loads(summary.read_text())
    for damaged in ("", "{", json.dumps(good | {"rounds": 7}), json.dumps({"eval/accuracy": 1})):
        summary.write_text(damaged)
        result = call("run", "--resume", "--name", "done", "--out", str(done.parent))
        assert result.exit_code == 0, result.output
        found = json.loads(summary.read_text())
        assert found | {"command": good["command"]} == good


def test_the_selected_round_has_a_column_of_its_own(tmp_path: Path) -> None:
    result = call("run", *SMALL, "evaluation.select=instance_accuracy", "--name", "a", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert f"selected ({summary['selected_round']})" in result.output
    row = next(line for line in result.output.splitlines() if line.startswith("│ accuracy "))
    assert f"{summary['eval/accuracy']['selected']:.4f}" in row.split("│")[-2]


def test_existing_folder_is_refused_untouched(done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    result = call("run", *SMALL, "--name", "done", "--out", str(done.parent))
    assert_refused(result, f"{done} exists already", "--name", "--resume")
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*")} == before


def test_resume_needs_a_name_and_a_run(done: Path) -> None:
    assert_refused(call("run", "--resume", "--out", str(done.parent)), "--resume needs --name")
    result = call("run", "--resume", "--name", "other", "--out", str(done.parent))
    assert_refused(result, "other", "does not exist", "--name")
    assert [path.name for path in done.parent.iterdir()] == ["done"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.lr=0.7", ["training.lr (saved 0.1, now 0.7)", "--name"]),
        ("method.name=supervised", ["`method.name` (=supervised)", "fedlabel"]),
        ("num_rounds=1", ["`num_rounds` (=1)", "2 rounds"]),
    ],
)
def test_resume_with_another_configuration_is_refused(override: str, words: list[str], done: Path) -> None:
    before = (done / "metrics.jsonl").read_bytes()
    result = call("run", override, "--resume", "--name", "done", "--out", str(done.parent))
    assert_refused(result, *words)
    assert (done / "metrics.jsonl").read_bytes() == before


def test_corrupt_checkpoint_is_named(tmp_path: Path) -> None:
    path = run_tiny(tmp_path, "a", "num_rounds=2").path
    newest = path / "checkpoints" / "round_000002.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1])
    resume = ["run", "num_rounds=3", "--resume", "--name", "a", "--out", str(tmp_path)]
    assert_refused(call(*resume), str(newest), "is damaged", "Delete it")
    newest.unlink()  # as the message says
    assert call(*resume).exit_code == 0
    assert load_checkpoint(path / "checkpoints" / "round_000003.ckpt").round_number == 3


def test_run_whose_clients_all_fail_is_status_1_with_its_checkpoint(tmp_path: Path) -> None:
    broken = "method.name=tests.integration.broken_method:BrokenFromRound2"
    small = [override for override in SMALL if not override.startswith("method.")]
    result = call("run", *small, broken, "--name", "a", "--out", str(tmp_path))
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Stopped: All 3 clients failed in round 2")
    assert "ArithmeticError: broken from round 2 on" in line
    assert str(tmp_path / "a" / "failures.log") in line
    (checkpoint,) = (tmp_path / "a" / "checkpoints").iterdir()
    assert load_checkpoint(checkpoint).round_number == 1
    assert not (tmp_path / "a" / "summary.json").exists()


@pytest.mark.parametrize("labels", ["labels_total=1", "label_rate=1.0"])
@pytest.mark.parametrize("method", ["fedlabel", "supervised"])
def test_clients_without_labels_or_without_unlabelled_data(labels: str, method: str, tmp_path: Path) -> None:
    """Either part may be empty: the phase that would draw from it does not run."""
    small = [override for override in SMALL if not override.startswith("method.")]
    overrides = [f"supervision.{labels}", f"method.name={method}"]
    result = call("run", *small, *overrides, "--name", "a", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    weights = load_checkpoint(tmp_path / "a" / "checkpoints" / "round_000002.ckpt").model
    assert all(bool(value.isfinite().all()) for value in weights.values())


def test_partition_writes_and_plots_without_training(tmp_path: Path) -> None:
    result = call("partition", "num_clients=4", "--out", str(tmp_path / "p"))
    assert result.exit_code == 0, result.output
    assert "4 clients" in result.output
    written = json.loads((tmp_path / "p" / "partition.json").read_text())
    assert len(written["clients"]) == 4
    assert all({"labeled", "unlabeled"} <= set(client) for client in written["clients"])
    assert (tmp_path / "p" / "partition.png").read_bytes().startswith(b"\x89PNG")
    audit = json.loads((tmp_path / "p" / "supervision.json").read_text())
    assert audit["partition_sha256"] == written["sha256"]
    assert audit["kinds"]["clients"][0][:2] == [len(written["clients"][0][key]) for key in ("unlabeled", "labeled")]
    names = ["partition.json", "partition.png", "supervision.json"]
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == names
    assert "Written: " + ", ".join(str(tmp_path / "p" / name) for name in names) in result.output
    assert "kinds of label" not in result.output
    assert "The server holds" not in result.output


def cells(output: str, title: str) -> list[list[str]]:
    """The cells of the table below a title, its head first."""
    lines = output[output.index(title) :].splitlines()[1:]
    rows = [
        [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines if line[:1] in "│┃"
    ]
    end = next((i for i, line in enumerate(lines) if line.startswith("└")), len(lines))
    return rows[: sum(line[:1] in "│┃" for line in lines[:end])]


KINDS = "supervision.mix=[{share: 0.5, kind: partial, partial_ratio: 0.3}, {share: 0.25, kind: noisy, noise_rate: 0.2}]"


def test_partition_shows_kinds_of_label_per_client(tmp_path: Path) -> None:
    """Of four clients two have sets (some of them of one class: labels), one noisy labels, one nothing."""
    arguments = ["partition", "num_clients=4", "partition.kind=iid", "evaluation.split=validation"]
    result = call(*arguments, KINDS, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    kinds = json.loads((tmp_path / "supervision.json").read_text())["kinds"]
    head, *rows = cells(result.output, "kinds of label per client")
    assert head == ["client", "nothing", "label", "candidates", "noisy label"]  # noisy candidates, ...: nobody has any
    places = [kinds["names"].index(name) for name in head[1:]]
    shown = [[str(counts[place]) for place in places] for counts in kinds["clients"]]
    assert rows == [[str(client), *counts] for client, counts in enumerate(shown)]
    assert [sum(row[place] != "0" for row in shown) for place in (0, 2, 3)] == [1, 2, 1]


def test_partition_of_many_clients_shows_kinds_in_short(tmp_path: Path) -> None:
    arguments = ["partition", "num_clients=21", KINDS, "--out", str(tmp_path)]
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    kinds = json.loads((tmp_path / "supervision.json").read_text())["kinds"]
    head, *rows = cells(result.output, "kinds of label per client")
    assert head == ["", "nothing", "label", "candidates", "noisy label"]
    counts = np.array(kinds["clients"])[:, [kinds["names"].index(name) for name in head[1:]]]
    assert len(counts) == 21
    expected = {"smallest": counts.min(0), "mean": counts.mean(0), "largest": counts.max(0)}
    assert rows == [[name, *(f"{value:.4g}" for value in values)] for name, values in expected.items()]


def test_partition_mentions_what_the_server_holds(tmp_path: Path) -> None:
    labels = ["supervision.labels_at=server", "supervision.labels_total=70"]
    result = call("partition", "num_clients=4", *labels, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "The server holds 70 labelled samples." in result.output
    assert "kinds of label" not in result.output


def test_partition_refuses_what_run_refuses(tmp_path: Path) -> None:
    assert_refused(call("partition", "num_clients=5000", "--out", str(tmp_path / "p")), "`num_clients` (=5000)")
    assert not (tmp_path / "p").exists()


def test_list_names_everything_that_can_be_chosen() -> None:
    result = call("list")
    assert result.exit_code == 0
    names = ("fedlabel", "supervised", "digits", "npz", "adult", "table", "cnn", "wrn28_2", "weighted_mean", "Krum")
    for name in names:
        assert f" {name} " in result.output


def test_doctor_says_what_would_be_used() -> None:
    result = call("doctor")
    assert result.exit_code == 0
    for word in ("torch", "flwr", "ray", "memory_gib", "device=auto gives"):
        assert word in result.output


def test_same_from_python(done: Path, tmp_path: Path) -> None:
    result = fedlabel.run(overrides=SMALL, name="a", out=tmp_path)
    assert result.path == tmp_path / "a"
    assert result.summary["eval/accuracy"] == json.loads((done / "summary.json").read_text())["eval/accuracy"]
    assert [row["round"] for row in result.metrics] == [1, 2]
    with pytest.raises(ValueError, match="exists already"):
        fedlabel.run(overrides=SMALL, name="a", out=tmp_path)


@pytest.mark.slow
def test_the_command_itself_reports_by_status(tmp_path: Path) -> None:
    """As a process: a method of the user's own is found in the working directory, an error is no traceback."""
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedlabel.methods.losses import labels_loss\n"
        "from fedlabel.methods.recipe import LabelKinds, Method, Phase, Recipe, Stage\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Method):\n"
        "    name: str = 'mine:Mine'\n"
        "    def recipe(self, task):\n"
        "        return Recipe((Stage((Phase('train', labels_loss),)),), uses=LabelKinds.TRUE)\n"
    )
    small = [override for override in SMALL if not override.startswith("method.")]
    for arguments, status in (["method.name=mine:Mine"], 0), (["method.name=mine:Yours"], 2):
        done = subprocess.run(
            fedlabel_command("run", *small, *arguments, "--name", str(status)),
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        assert (tmp_path / "runs" / str(status)).exists() == (status == 0)


def test_help_and_version_wait_for_no_library() -> None:
    """torch and scikit-learn take seconds to import, which the commands that need them do."""
    code = "import sys, fedlabel.cli.main as cli\ntry: cli.main()\nfinally: print(sorted(sys.modules), file=sys.stderr)"
    for argument, shown in (("--help", "Usage"), ("--version", "fedlabel 0")):
        done = subprocess.run(
            [sys.executable, "-c", code, argument], env=environment(), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout
        loaded = set(ast.literal_eval(done.stderr))
        assert "fedlabel.cli.main" in loaded
        assert not loaded & {"torch", "sklearn", "scipy", "matplotlib", "ray", "flwr"}


@pytest.mark.slow
def test_a_run_waits_for_no_library_that_it_does_not_need(tmp_path: Path) -> None:
    """Each takes as long to import as torch or half of it: pandas comes with scikit-learn, SQLAlchemy with Flower's
    servers.
    """
    code = "import sys, fedlabel.cli.main as cli\ntry: cli.main()\nfinally: print(sorted(sys.modules), file=sys.stderr)"
    keys = ("num_rounds=1", "num_clients=2", "training.local_steps=1", "evaluation.figures=false")
    done = subprocess.run(
        [sys.executable, "-c", code, "run", *keys, "--out", str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(ast.literal_eval(done.stderr.splitlines()[-1]))
    assert "torch" in loaded
    assert not loaded & {"sklearn", "pandas", "matplotlib", "ray", "sqlalchemy", "flwr.superlink.grid"}


def test_version() -> None:
    result = call("--version")
    assert (result.exit_code, result.output) == (0, f"fedlabel {importlib.metadata.version('fedlabel')}\n")


def test_list_of_one_thing() -> None:
    result = call("list", "fixmatch")
    assert result.exit_code == 0
    assert "method.confidence_threshold (float), default 0.95" in result.output
    assert "Sohn" in result.output
    assert "training.lr (float), default 0.1" in call("list", "training").output
    assert_refused(call("list", "fixmtch"), "`fixmtch` is neither a method nor a section", "Did you mean fixmatch")


@pytest.mark.parametrize("when", ["before", "during"])
def test_ctrl_c_says_how_to_go_on_by_the_runs_name(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    target = "server.simulation.open_experiment" if when == "before" else "server.server.Server.observe"
    monkeypatch.setattr(target, interrupt)
    out = tmp_path / "with space"
    result = call("run", *SMALL, "--out", str(out))
    assert result.exit_code == 130
    if when == "before":
        assert result.stderr == "Interrupted. Nothing had begun.\n"
        return
    (path,) = out.iterdir()
    command = f"`fedlabel run --resume --name {path.name} --out '{out}'`"
    assert result.stderr == f"Interrupted. {command} goes on from the last checkpoint.\n"
    monkeypatch.undo()
    assert call(*shlex.split(command.strip("`"))[1:]).exit_code == 0


def test_what_a_user_wrote_is_printed_as_it_is_and_whole(tmp_path: Path) -> None:
    """Neither markup nor emoji, and no cell is cut, however narrow the terminal."""
    result = CliRunner().invoke(app, ["run", "data.name='[red]x[/red]:smile:'"], env={"COLUMNS": "40"})
    assert_refused(result, "`data.name` (=[red]x[/red]:smile:) must be one of")
    console = Console(width=30, file=io.StringIO(), markup=False, emoji=False)
    table = make_table("[b]what", title="[i]title")
    table.add_row("[red]a-name-without-any-space-that-is-longer-than-the-terminal:cat:")
    console.print(table)
    shown = console.file.getvalue()
    joined = "".join(line.strip("│ \n") for line in shown.splitlines() if "│" in line)
    assert joined == "[red]a-name-without-any-space-that-is-longer-than-the-terminal:cat:"
    assert "[b]what" in shown
    assert "[i]title" in shown


def test_a_file_may_have_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=1.yaml").write_text("training: {lr: fast}\n")
    assert_refused(call("run", "lr=1.yaml"), "`training.lr` (=fast) must be a number")


def test_a_network_larger_than_the_machine_is_refused_before_it_is_made(tmp_path: Path) -> None:
    result = call("run", *SMALL, "model.name=resnet18", "model.width=4096", "--name", "a", "--out", str(tmp_path))
    assert_refused(result, "`model.width` (=4096)", "A run needs 8 times their size", "take a smaller one")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("method", ["fedlabel", "fedmatch"])
def test_a_run_that_diverges_says_so_without_a_warning(method: str, tmp_path: Path) -> None:
    small = [override for override in SMALL if not override.startswith("method.")]
    result = call("run", *small, f"method.name={method}", "training.lr=1e6", "--name", "a", "--out", str(tmp_path))
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.strip().splitlines()
    assert "Training diverged: take a smaller training.lr (=1e+06)" in line


def test_partition_prints_what_a_loader_has_to_say(tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz", weights=np.zeros(3))
    result = call(
        *("partition", "data.name=npz", f"data.root={tmp_path / 'set.npz'}", "num_clients=2"),
        *("supervision.label_rate=0.5", "--out", str(tmp_path / "p")),
    )
    assert result.exit_code == 0, result.output
    assert result.output.count("note: ") == 1
    assert f"note: {tmp_path / 'set.npz'}: weights of it is used only where a key names it" in result.output


def test_a_run_whose_output_nobody_reads_says_that_it_stops_and_how_to_go_on(tmp_path: Path) -> None:
    """As by `fedlabel run | head`, whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    command = fedlabel_command("run", *SMALL, "--name", "a", "--out", str(tmp_path))
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment(), check=False)
    os.close(writer)
    assert ended.returncode == 1
    assert "nobody reads the output" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_partition_has_a_row_for_each_client_with_its_name(tmp_path: Path) -> None:
    names = ["Bern", "[b]Aachen", "C" * 40]
    rows = [f"{i},{'xy'[i % 2]},{names[i // 20]}" for i in range(60)]
    (tmp_path / "set.csv").write_text("\n".join(["number,class,hospital", *rows]) + "\n")
    table = ["data.name=table", f"data.root={tmp_path / 'set.csv'}", "data.label_column=class"]  # the model is cnn
    owners = ["partition.kind=column", "partition.column=hospital", "num_clients=3", "supervision.label_rate=0.5"]
    result = call("partition", *table, *owners, "--out", str(tmp_path / "p"))
    assert result.exit_code == 0, result.output
    head, *shown = cells(result.output, "clients")
    assert head == ["client", "name", "samples", "labelled"]
    written = json.loads((tmp_path / "p" / "partition.json").read_text())["clients"]
    counts = [(len(each["labeled"]), len(each["unlabeled"])) for each in written]
    short = {name: name if len(name) < 25 else name[:24] + "…" for name in names}
    expected = [[short[each["name"]], str(a + b), str(a)] for each, (a, b) in zip(written, counts, strict=True)]
    assert shown == [[str(client), *row] for client, row in enumerate(expected)]


def test_partition_says_which_rows_of_a_table_are_for_testing(tmp_path: Path) -> None:
    rows = [f"{i},{'xy'[i % 2]}" for i in range(40)]
    file = tmp_path / "set.csv"
    file.write_text("\n".join(["number,class", *rows]) + "\n")
    table = ["data.name=table", f"data.root={file}", "data.label_column=class", "data.test_fraction=0.25"]
    few = ["num_clients=2", "partition.kind=iid", "supervision.label_rate=0.5"]
    result = call("partition", *table, *few, "--out", str(tmp_path / "p"))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "p" / "partition.json").read_text())["test_rows"]
    test = load_dataset(load_config([], [*table, *few]).data, seed=0).tables["test"]
    assert found == test.column("number").tolist()
    assert len(found) == 10
    table[-1] = "data.test_file=set.csv"  # a test set of its own
    assert call("partition", *table, *few, "--out", str(tmp_path / "q")).exit_code == 0
    assert "test_rows" not in json.loads((tmp_path / "q" / "partition.json").read_text())
