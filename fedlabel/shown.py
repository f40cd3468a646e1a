"""Somebody else's texts and values in our messages: nothing in them that a terminal obeys, and not too long."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    """Returns a text in which what is no printable character is escaped (terminal codes, marks that turn the direction
    of writing, line ends), but for those of `keep`.
    """
    return "".join(each if each.isprintable() or each in keep else ascii(each)[1:-1] for each in text)


def shown(value: object, most: int = 100, keep: str = "") -> str:
    """Returns the text of a value, see `printable`, cut after `most` characters."""
    text = str(value)
    return printable(text[:most], keep) + "…" * (len(text) > most)


def shown_repr(value: object, most: int = 60) -> str:
    """Returns how Python writes a value of whatever class, in one line, see `shown`."""
    try:
        text = repr(value)
    except Exception as error:  # of a class of the user's own
        text = f"<{type(value).__name__}, whose repr fails: {type(error).__name__}>"
    return shown(" ".join(text.split()), most)
