"""The run folder, and the figures in it."""
