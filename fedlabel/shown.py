"""Makes foreign texts and values safe for messages: printable, without terminal control codes, and not too long."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    """Returns a text with unprintable characters escaped (terminal codes, marks of writing direction, line ends),
    except those of `keep`.
    """
    return "".join(each if each.isprintable() or each in keep else ascii(each)[1:-1] for each in text)


def shown(value: object, most: int = 100, keep: str = "") -> str:
    """Returns the text of a value, see `printable`, truncated after `most` characters."""
    text = str(value)
    return printable(text[:most], keep) + "…" * (len(text) > most)


def shown_repr(value: object, most: int = 60) -> str:
    """Returns Python's repr of any value, in one line, see `shown`."""
    try:
        text = repr(value)
    except Exception as error:  # of a class of the user's own
        text = f"<{type(value).__name__}, whose repr fails: {type(error).__name__}>"
    return shown(" ".join(text.split()), most)
