"""Formal verification: what holds for every input of a set."""
