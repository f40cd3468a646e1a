"""The probability: pure functions of tensors, each tested against a slow and obvious derivation."""
