"""The run of a recipe: what its method can learn from the labels that a federation holds."""
