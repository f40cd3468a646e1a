"""YAML as the configuration reads it: what stays as written, and what is refused, in one line of ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fedlabel.config import load_config, split_overrides
from fedlabel.config_text import (
    MAX_BYTES,
    ConfigError,
    Plain,
    merged,
    one_line,
    parse_value,
    parse_yaml,
    plain,
    read_mapping,
)


@pytest.mark.parametrize(
    "text", ["010", "1e5", "1.10", "no", "yes", "on", "12:30", "1_000", "0x10", "true", "2020-01-01"]
)
def test_a_name_stays_what_was_written(text: str) -> None:
    """YAML 1.1 would make them 8, 100000.0, 1.1, False, True, True, 750, 1000, 16, True and a date."""
    config = load_config([], ["data.name=table", f"data.label_column={text}", f"data.drop_columns=[{text}]"])
    assert (config.data.label_column, config.data.drop_columns) == (text, (text,))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-3", -3),
        ("010", 10),
        ("1e-3", 0.001),
        (".5", 0.5),
        ("5.", 5.0),
        ("True", True),
        ("-.inf", -float("inf")),
    ],
)
def test_numbers_and_booleans(text: str, value: float) -> None:
    found = parse_value(text, "it")
    assert found == Plain(value, text)
    assert type(plain(found)) is type(value)


@pytest.mark.parametrize(
    "text", ["1e5", "010", "null", "", "~", "no", "a: b", "# a", "'", "[x", "ä", "089", ".inf", "true"]
)
def test_texts_are_written_so_that_they_are_read_back(text: str) -> None:
    assert parse_yaml(OmegaConf.to_yaml({"a": text}), "it") == {"a": text}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x 1\nb: *x\n", "line 2 has an alias"),
        ("a: !!float 1\n", "line 1 has a tag \\(!!float\\): leave it out"),
        ("a: !!python/object/apply:os.system [ls]\n", "has a tag"),
        ("a: ${oc.env:HOME}\n", r"has \$\{oc.env:HOME\}: nothing is put in place"),
        ("a: 1\nb: 2\na: 3\n", "has the key a twice \\(line 3\\)"),
        ("a:\n\tb: 1\n", "line 2 begins with a tab"),
        ("a: 1\n---\nb: 1\n", "a second document begins in line 2"),
        ("a: 1\nb: [1\nc: 2\n", "is not readable YAML"),
        ("a: {hidden:64}\n", "YAML needs a space after the colon: write hidden: 64\\."),
        ("a: b: c\n", "is not readable YAML"),
        ("? [a]\n: 1\n", "line 1 has a list or mapping for a key"),
        ("a: " + "[" * 30 + "]" * 30, "more than 20 deep"),
        ('a: "\\0"\n', "which cannot be printed"),
        ("a: \x1b[31m\n", "which cannot be printed"),
    ],
)
def test_documents_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse_yaml(text, "x.yaml")
    assert str(caught.value).startswith("x.yaml")
    assert str(caught.value).isprintable()


def test_colons_without_a_space_that_are_meant() -> None:
    assert parse_yaml("a: {'hidden:64': , b:8: c, d: }", "x") == {"a": {"hidden:64": None, "b:8": "c", "d": None}}


def test_aliases_that_would_fill_any_memory_are_refused_at_once(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    bomb.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="has an alias"):
        load_config([bomb])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    for content, words in {
        b"\xff\xfea\x00": "is no UTF-8 text. Save it as UTF-8",
        b"- a\n": "must hold a mapping of keys to values.*not a list",
        b"7\n": r"not one value \(=7\)",
        b"a: 1\n" + b"#" * MAX_BYTES: "more than 1,000,000 bytes",
    }.items():
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            read_mapping(file)
    file.write_bytes(b"\xef\xbb\xbfseed: 3\r\n")  # as Windows' editor writes it
    assert load_config([file]).seed == 3
    file.write_text("# nothing yet\n")
    assert read_mapping(file) == {}
    with pytest.raises(ConfigError, match="does not exist"):
        load_config([tmp_path])
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(["a" * 5000 + ".yaml"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("seed: 1\n")
    file.chmod(0)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        read_mapping(file)


def test_a_comment_would_cut_an_override_short() -> None:
    for text in ("a #b", "#b", "[1] # x", "'a' #b"):
        with pytest.raises(ConfigError, match="begins a comment. Put the value in quotes"):
            parse_value(text, "it")
    assert parse_value("'a #b'", "it") == "a #b"
    assert parse_value("a#b", "it") == "a#b"


def test_layers() -> None:
    assert merged({"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}, "d": 3}) == {"a": {"b": 1, "c": [2]}, "d": 3}
    assert merged({"a": None}, {"a": {"b": 1}}) == {"a": {"b": 1}}
    with pytest.raises(ConfigError, match=r"`a.b` \(=\{'0': 1\}\) does not fit what was said before \(=\[1\]\)"):
        merged({"a": {"b": [1]}}, {"a": {"b": {"0": 1}}})


def test_a_message_is_one_line_that_any_terminal_can_print() -> None:
    assert one_line("a\n  b\x1b[31m\ud800\u202e") == "a b\\x1b[31m\\ud800\\u202e"
    assert len(one_line("x" * 10**6)) < 2000


def test_overrides_in_one_text() -> None:
    assert split_overrides("a=1 'b=[1, 2]'") == ["a=1", "b=[1, 2]"]
    with pytest.raises(ConfigError, match="a quote that is not closed"):
        split_overrides("a='1")
