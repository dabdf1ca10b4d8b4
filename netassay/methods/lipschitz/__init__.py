"""Lipschitz constants and boxes: how much a network can stretch its input, and how much of that a bound can see."""
