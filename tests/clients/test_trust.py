"""What a server cannot make a node do, and what a node never says: attacks by the text of an experiment alone."""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.config import parse_config_args

import clients.trust
import fedlabel.experiment
from clients.client_app import app
from clients.trust import CHOICES, GUARDED, NAMES, UNUSED
from fedlabel.config import ConfigError, ExperimentConfig, load_config, to_yaml
from fedlabel.config_schema import fields_of, hints
from fedlabel.hardware import PACKAGE_ROOT, resolve_device, source_hash
from fedlabel.methods import METHODS
from tests.integration.local_nodes import LocalNodes

TINY = (
    *("num_clients=2", "partition.kind=iid", "data.train_samples=60", "model.name=mlp", "model.hidden_layers=[4]"),
    *("training.local_steps=1", "device=cpu"),
)
KINDS = ("query", "train")
SECRET = "the first line of a file"


@pytest.fixture(autouse=True)
def own_caches() -> Iterator[None]:
    yield
    fedlabel.experiment.open_experiment.cache_clear()
    clients.trust.check_request.cache_clear()


def ask(kind: str, text: str, node_config: str = "", code: str | None = None) -> Message:
    """Returns the reply of node 1 to a query, or to a round, whose experiment is `text`."""
    about = ConfigRecord({"experiment": text, "source-hash": source_hash() if code is None else code})
    if kind == "query":
        content = RecordDict({"ask": about})
    else:
        about["server-round"] = 1
        content = RecordDict({"config": about, "arrays": ArrayRecord({}), "shared": ConfigRecord({})})
    message = Message(content, 1, kind)
    message.metadata.__dict__["_message_id"] = "1"
    return LocalNodes(app, 2, parse_config_args([node_config]) if node_config else {}).answer(message)


def refusal(kind: str, text: str, node_config: str = "", code: str | None = None) -> str:
    """Returns why a node refuses, after looking at what must be in no refusal."""
    reply = ask(kind, text, node_config, code)
    assert reply.has_error()
    reason = str(reply.error.reason)
    assert len(reason) < 700
    for secret in (SECRET, "Traceback", ".py", "line ", str(PACKAGE_ROOT), str(Path.home()), str(Path.cwd())):
        assert secret not in reason.replace(text, ""), reason
    return reason


def with_keys(**keys: str) -> str:
    """Returns the text of an experiment in which these keys, with _ for a dot, are what an attacker wrote."""
    text = to_yaml(load_config([], TINY))
    for key, value in keys.items():
        section, _, name = key.partition("__")
        old = next(line for line in _section(text, section) if line.strip().startswith(f"{name or section}:"))
        text = text.replace(old, f"{old.partition(':')[0]}: {value}", 1)
    return text


def _section(text: str, section: str) -> list[str]:
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"{section}:"))
    return lines[start:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_is_not_imported(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it holds: importing alone runs code."""
    (tmp_path / "foreign_module.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    reason = refusal(kind, with_keys(method__name="'foreign_module:Mine'"))
    assert reason.startswith("Refused: this node does not allow `method.name` (=foreign_module:Mine)")
    assert "foreign_module" not in sys.modules
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_no_network_of_others_is_built(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither from a module, nor of another package, nor filled from a file."""
    (tmp_path / "foreign_network.py").write_text(
        f"import pathlib\nimport torch\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "def build():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = to_yaml(load_config([], [*TINY[:3], "device=cpu", "model.name=foreign_network:build"]))
    assert refusal(kind, text).startswith("Refused: this node does not allow `model.name` (=foreign_network:build)")
    assert "foreign_network" not in sys.modules
    assert not (tmp_path / "ran").exists()
    monkeypatch.chdir(tmp_path)  # nor does a node say what lies in its folder
    for name in ("timm:resnet18", "python:Net#01234567", "foreign_network"):
        reason = refusal(kind, text.replace("foreign_network:build", name))
        assert reason.startswith(f"Refused: this node does not allow `model.name` (={name})")
    other = text.replace("weights: null", "weights: /etc/passwd")
    assert "`model.weights` (=/etc/passwd)" in refusal(kind, other, 'allow="model.name=foreign_network:build"')
    if kind == "query":
        assert not ask(kind, text, 'allow="model.name=foreign_network:build"').has_error()
        sys.modules.pop("foreign_network", None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_labeling_functions_is_not_run(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "functions"
    file.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    text = with_keys(
        supervision__kind="labeling_functions", supervision__label_rate="null", supervision__module=f"'{file}'"
    )
    reason = refusal(kind, text)
    assert reason.startswith(f"Refused: this node does not allow `supervision.module` (={file})")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_no_variable_of_the_environment_comes_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLABEL_SECRET", SECRET)
    for text in (with_keys(seed="${oc.env:FEDLABEL_SECRET}"), with_keys(data__root="x${oc.env:FEDLABEL_SECRET}")):
        assert "nothing is put in place of ${...}" in refusal(kind, text)
    assert SECRET not in refusal(kind, "${oc.env:FEDLABEL_SECRET}: 1")


@pytest.mark.parametrize("kind", KINDS)
def test_no_line_of_a_file_comes_back(kind: str, tmp_path: Path) -> None:
    """Neither where the file is not allowed, nor where it is and the reader's message would quote it."""
    file = tmp_path / "rows"
    file.write_text(f"{SECRET}\n1,2\n")
    text = with_keys(data__name="table", data__root=f"'{file}'", data__label_column="none")
    assert refusal(kind, text).startswith(f"Refused: this node does not allow `data.root` (={file})")
    allowed = f'allow="data.root={file}"'
    assert refusal(kind, text, allowed) == "ValueError: the client failed; the node's own log says why"


def test_the_folder_of_a_user_is_allowed_even_if_it_is_the_default() -> None:
    assert "`data.root` (=data)" in refusal("query", with_keys(data__name="npz"))


def test_the_whole_error_is_in_the_nodes_own_log(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    text = with_keys(data__name="npz", data__root=f"'{tmp_path}'")
    with caplog.at_level(logging.ERROR, "fedlabel"):
        refusal("query", text, f'allow="data.root={tmp_path}"')
    (record,) = caplog.records
    assert record.exc_info is not None
    assert str(tmp_path) in str(record.exc_info[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_with_other_code_gets_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node compares the hash itself."""
    opened: list[str] = []
    monkeypatch.setattr("clients.client_app.open_experiment", opened.append)
    if kind == "train":
        assert "the server runs other code (hash 0123, at this node" in refusal(kind, with_keys(), code="0123")
    else:  # it says which code it has, and no more
        reply = ask(kind, with_keys(), "partition-id=0", code="0123")
        assert set(reply.content["identity"]) == {"partition-id", "source-hash"}
    assert opened == []


def test_what_the_operator_allows_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_method_for_trust.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedlabel.methods.supervised import Supervised\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Supervised):\n"
        "    name: str = 'own_method_for_trust:Mine'\n"
        "    weights: str = ''\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = to_yaml(load_config([], [*TINY, "method.name=own_method_for_trust:Mine"]))
    name = "method.name=own_method_for_trust:Mine"
    assert not ask("query", text, f'allow="{name}"').has_error()
    other = text.replace("weights: ''", "weights: /etc/passwd")
    assert other != text
    assert "`method.weights` (=/etc/passwd)" in refusal("query", other, f'allow="{name}"')
    assert not ask("query", other, f'allow="{name} method.weights=/etc/passwd"').has_error()


def test_the_operator_allows_a_module_of_labeling_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This one and no other is imported."""
    for name in ("allowed_functions", "other_functions"):
        ran = f"import pathlib\npathlib.Path({str(tmp_path / name)!r}).touch()\n"
        (tmp_path / f"{name}.py").write_text(f"{ran}def dark(image):\n    return 0 if image.mean() < 70 else None\n")
    monkeypatch.syspath_prepend(tmp_path)
    allow = 'allow="supervision.module=allowed_functions"'

    def asked(module: str) -> str:
        keys = ("method.name=dp_ssl", "method.functions=written", "method.num_functions=1")
        keys += ("supervision.kind=labeling_functions", "supervision.label_rate=null", f"supervision.module={module}")
        return to_yaml(load_config([], [*TINY, *keys]))

    assert "`supervision.module` (=other_functions)" in refusal("query", asked("other_functions"), allow)
    assert not ask("query", asked("allowed_functions"), allow).has_error()
    assert (tmp_path / "allowed_functions").exists()
    assert not (tmp_path / "other_functions").exists()


@pytest.mark.parametrize("written", ["'one", "data.root", "=x"])
def test_a_list_that_cannot_be_read_allows_nothing(written: str) -> None:
    assert "this node's own `allow` cannot be read" in refusal("query", with_keys(), f'allow="{written}"')


def test_a_download_is_guarded_although_it_is_no_text() -> None:
    assert "`data.download` (=true)" in refusal("query", with_keys(data__download="true"))


def test_a_part_of_a_mix_is_guarded() -> None:
    mix = "supervision.mix=[{share: 1, kind: labeling_functions, module: /etc/passwd}]"
    text = to_yaml(load_config([], [*TINY, mix, "method.name=dp_ssl", "method.functions=written"]))
    assert "`supervision.module` (=/etc/passwd)" in refusal("query", text)


def test_a_file_of_the_node_that_is_damaged_is_not_named(tmp_path: Path) -> None:
    """Errors around the app's handlers are as discreet as theirs."""
    (tmp_path / ("0" * 32)).mkdir()
    (tmp_path / ("0" * 32) / "client0-000001.memory").mkdir()  # cannot be read
    about = {
        "experiment": with_keys(),
        "source-hash": source_hash(),
        "run": "0" * 32,
        "server-round": 2,
        "saved-round": 0,
    }
    message = Message(RecordDict({"config": ConfigRecord(about)}), 1, "train")
    message.metadata.__dict__["_message_id"] = "1"
    reply = LocalNodes(app, 2, {"memory": str(tmp_path)}).answer(message)
    assert reply.error.reason == "IsADirectoryError: the client failed; the node's own log says why"


def test_text_that_is_no_configuration() -> None:
    for text in ("- 1", "seed: [", "seed: !!python/object:os.system 1", "nobody: 1", "method: 3", ""):
        reply = ask("train", text)
        assert reply.has_error()
        assert len(str(reply.error.reason)) < 700


# ------------------------------------------------------------------------------------------------- all keys


def texts(schema: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields (key at a node, key to write) of every key of a configuration that can hold a text."""
    for name in fields_of(schema):
        yield from _texts(hints(schema)[name], prefix + name, prefix)


def _texts(kind: Any, key: str, owner: str) -> Iterator[tuple[str, str]]:
    inner = [each for each in typing.get_args(kind) if each is not Ellipsis]
    if dataclasses.is_dataclass(kind):
        yield from texts(typing.cast(type, kind), f"{key}.")
    elif kind is str or (kind is Any and key != "method") or typing.get_origin(kind) is dict:
        yield key, key
    elif typing.get_origin(kind) is tuple and dataclasses.is_dataclass(inner[0]):
        yield from texts(typing.cast(type, inner[0]), owner)
    else:
        for each in inner:
            yield from _texts(each, key, owner)


KEYS = sorted({key for key, _ in texts(ExperimentConfig)})
OF_METHODS = [(name, key) for name, method in METHODS.items() for key, _ in texts(method, "method.")]


def test_every_key_that_can_hold_a_text_is_in_one_table() -> None:
    """A new key is guarded until it is in another table; here somebody decides."""
    tables = (NAMES, CHOICES, GUARDED, UNUSED)
    assert [key for key in KEYS if sum(key in table for table in tables) != 1] == []
    assert set().union(*tables) - set(KEYS) == {"data.download", "method.name"}  # no text; of methods


PATHS = ("/etc/passwd", "os:system", "../up")
BESIDE = {
    "data.decimal": ("data.name=table", "data.label_column=y"),
    "supervision.mix_over": ("supervision.mix=[{share: 1, kind: full}]",),
}
"""Keys that are looked at only beside others."""


def accepts(key: str, value: str, *others: str) -> bool:
    """Returns whether a configuration may have this value; another reason to refuse it does not count."""
    try:
        load_config([], [*others, f"{key}={value}"])
    except ConfigError as error:
        return f"`{key}` (={value}) must" not in str(error)
    return True


@pytest.mark.parametrize("key", sorted(CHOICES))
def test_a_choice_has_no_other_values(key: str) -> None:
    for path in PATHS:
        if key == "device":  # checked when it is opened
            with pytest.raises(ValueError, match=re.escape(f"`device` (={path}) must")):
                resolve_device(path)
        elif key == "devices.profile":
            with pytest.raises(ConfigError, match=re.escape(f"profile` (={path}) must")):
                load_config([], ["devices.kind=preset", f"devices.population=[{{profile: '{path}', share: 1}}]"])
        else:
            assert not accepts(key, path, *BESIDE.get(key, ()))


@pytest.mark.parametrize(("method", "key"), OF_METHODS, ids=lambda value: str(value))
def test_the_texts_of_our_methods_are_choices(method: str, key: str) -> None:
    """So that they need no table: a method of ours that reads a file needs its key in `GUARDED`."""
    if key != "method.name":
        assert key in GUARDED or not any(accepts(key, path, f"method.name={method}") for path in PATHS)


def test_a_key_in_no_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in ("NAMES", "GUARDED"):
        monkeypatch.setattr(clients.trust, table, getattr(clients.trust, table) - {"data.positive_classes"})
    text = to_yaml(load_config([], [*TINY, "data.positive_classes=[/etc/passwd]"]))
    assert "`data.positive_classes`" in refusal("query", text)


def test_workers_of_a_simulation_take_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """They belong to whoever wrote the configuration."""
    text = to_yaml(load_config([], [*TINY, "data.download=true"]))
    for there, actor in ((False, None), (True, None), (True, "an actor's id")):
        ray = types.SimpleNamespace(
            is_initialized=lambda there=there: there,
            get_runtime_context=lambda actor=actor: types.SimpleNamespace(get_actor_id=lambda: actor),
        )
        monkeypatch.setitem(sys.modules, "ray", ray)
        assert ask("query", text, "partition-id=0").has_error() == (actor is None)
