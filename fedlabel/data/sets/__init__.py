"""Data sets: what a set is, and readers of embedded, downloaded and own ones."""
