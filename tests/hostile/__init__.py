"""Hostile input: every reader of files under mutated input, and messages that no dispatcher sent.

`python -m tests.hostile --minutes 30` is the long run; the tests beside run each reader for some seconds.
"""
