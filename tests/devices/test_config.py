"""The node `devices` of the configuration: what is allowed, and that old configurations mean the same as before."""

from __future__ import annotations

import re

import pytest

from fedlabel.config import ConfigError, flatten, load_config, parse_config, to_yaml
from fedlabel.devices.config import DevicesConfig

PHONES = "population=[{profile: phone}]"


def test_an_older_configuration_means_no_devices() -> None:
    """A run that was begun before there were devices is resumed and reused by a sweep."""
    config = load_config(overrides=["seed=3"])
    before = re.sub(r"^devices:\n(?:[ -].*\n)+", "", to_yaml(config), flags=re.MULTILINE)
    assert "devices" not in before
    assert parse_config(before) == config
    assert flatten(parse_config(before)) == flatten(config)
    assert config.devices == DevicesConfig()


def test_text_form_reads_back_equal() -> None:
    config = load_config(
        overrides=[
            "devices.kind=lognormal",
            "devices.population=[{profile: phone, share: 0.75}, {profile: laptop, share: 0.25, forward: 900}]",
            "devices.sigma=0.5",
            "devices.correlation=-0.5",
            "devices.rare_classes=[8, 9]",
        ]
    )
    assert parse_config(to_yaml(config)) == config
    assert config.devices.profiles[1][:2] == (900, 450)
    assert config.devices.rare_classes == ("8", "9")
    hash(config.devices)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["kind=phone"], r"`devices.kind` \(=phone\) must be one of none, preset, lognormal, zipf, trace"),
        (["kind=preset"], r"shares of `devices.population` sum to 0; for devices.kind=preset they must sum to 1"),
        (["kind=zipf", "population=[{profile: phone, share: 0.4}]"], r"sum to 0.4; for devices.kind=zipf"),
        (["kind=preset", "population=[{profile: fone}]"], r"population\[0\].*must be one of .*Did you mean phone\?"),
        (["kind=preset", "population=[{share: 1}]"], r"`devices.population\[0\].profile` must be given"),
        (["kind=preset", "population=[{profile: phone, share: 0}]"], r"share` \(=0.0\) must lie in \(0, 1\]"),
        (["kind=preset", "population=[{profile: phone, up: 0}]"], r"up` \(=0.0\) must lie in \(0, 1e\+30\]"),
        (["kind=preset", "population=[{profile: phone, speed: 1}]"], r"`devices.population\[0\].speed` is not a conf"),
        (["kind=preset", "population=phone"], r"`devices.population` \(=phone\) must be a list of mappings"),
        (["kind=trace"], r"`devices.kind` \(=trace\) needs `devices.trace`, the path of a CSV file"),
        (["trace=x.csv"], r"`devices.trace` \(=x.csv\) has no effect with devices.kind=none: .*devices.kind=trace"),
        (["kind=trace", "trace=x.csv", "available=0.5"], r"`devices.available` \(=0.5\) has no effect .*kind=trace"),
        (["kind=trace", "trace=x.csv", "population=[{profile: phone}]"], r"`devices.population` .* has no effect"),
        (["correlation=0.5"], r"`devices.correlation` \(=0.5\) has no effect with devices.kind=none"),
        (["dropout_after=0.5"], r"`devices.dropout_after` \(=0.5\) has no effect with devices.kind=none"),
        (["kind=preset", PHONES, "sigma=2"], r"`devices.sigma` \(=2\) has no effect with devices.kind=preset"),
        (["kind=lognormal", PHONES, "exponent=2"], r"`devices.exponent` \(=2\) has no effect"),
        (["kind=lognormal", PHONES, "sigma=0"], r"`devices.sigma` \(=0\) must lie in \(0, 10\]"),
        (["kind=zipf", PHONES, "exponent=-1"], r"`devices.exponent` \(=-1\) must lie in \(0, 10\]"),
        (["kind=preset", PHONES, "correlation=1.5"], r"`devices.correlation` \(=1.5\) must lie in \[-1, 1\]"),
        (["kind=preset", PHONES, "rare_classes=[1]"], r"rare_classes` \(=\[1\]\) has no effect with .*correlation"),
        (["kind=preset", PHONES, "available=0"], r"`devices.available` \(=0\) must lie in \[0.001, 1\]"),
        (["kind=preset", PHONES, "period=0"], r"`devices.period` \(=0\) must lie in \[1, 1e\+09\]"),
        (["kind=preset", PHONES, "period=9", "available=1"], r"`devices.period` \(=9\) has no effect where all"),
        (["kind=preset", PHONES, "dropout_before=2"], r"`devices.dropout_before` \(=2\) must lie in \[0, 1\]"),
        (["kind=preset", PHONES, "dropout_before=.6", "dropout_after=.6"], "sum to 1.2; they must sum to at most 1"),
    ],
)
def test_what_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(overrides=[f"devices.{override}" for override in overrides])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("device.kind=preset", r"`device` \(=\{kind: preset\}\) is where this machine computes.*write devices.kind"),
        ("device_conf_file=x", r"Did you mean devices.trace\?"),
        ("availability=x", r"Did you mean devices.available\?"),
        ("devices.corelation=1", r"Did you mean devices.correlation\?"),
    ],
)
def test_other_names(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(overrides=[override])
