"""Training and evaluation in a round, on clients and server: plan, batches, local steps, metrics."""
