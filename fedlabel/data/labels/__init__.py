"""Supervision: the record of labels that a client holds, how it is made, and the label card."""
