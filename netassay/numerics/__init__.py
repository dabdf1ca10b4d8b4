"""Shared mathematics in PyTorch, under the name the field uses."""
