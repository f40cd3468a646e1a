"""The name that somebody may have meant."""

from __future__ import annotations

from fedlabel.names import COMPARED, LONGEST_CLIENT_NAME, client_label, did_you_mean, near


def test_a_name_is_found_through_case_and_blanks_first() -> None:
    assert near("LEFT eye", ["lefteyes", "Left_Eye"]) == ["Left_Eye"]
    assert near("lef", ["right", "Left"]) == ["Left"]
    assert near("zebra", ["right", "Left"]) == []
    assert near("ab1", ["ab2", "ab3", "zz"], most=2) == ["ab3", "ab2"]
    assert near("ab1", ["ab2"], cutoff=0.9) == []


def test_of_very_many_names_only_the_same_is_found() -> None:
    many = [str(number) for number in range(COMPARED)]
    assert near("Site", [*many, "sites"]) == []
    assert near("Site", [*many, "site"]) == ["site"]


def test_the_hint_is_a_sentence_that_can_be_printed() -> None:
    assert did_you_mean("ab\x1b1", ["ab\x1b2", "zz"]) == r" Did you mean ab\x1b2?"
    assert did_you_mean("ab1", ["ab2", "ab3"], most=2) == " Did you mean ab3 or ab2?"
    assert did_you_mean("q", ["ab"]) == ""


def test_a_client_is_called_by_number_and_name_shortened_and_printable() -> None:
    assert client_label(3, None) == "3"
    assert client_label(3, "Aachen") == "3: Aachen"
    assert client_label(0, "a\x1b[31m") == "0: a\\x1b[31m"
    assert client_label(0, "x" * 99) == "0: " + "x" * LONGEST_CLIENT_NAME + "…"
