"""Branch and bound: a region is split until the bounds over each part decide it."""
