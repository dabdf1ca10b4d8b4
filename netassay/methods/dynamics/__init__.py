"""Dynamics of training: what gradient descent does along the way."""
