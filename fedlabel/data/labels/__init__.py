"""Supervision: the supervision record, its generation from true labels, and the label card."""
