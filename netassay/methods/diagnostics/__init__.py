"""Jobs with a known behaviour, good and bad, for tests and for operators to try their lab with."""
