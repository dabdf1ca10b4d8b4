"""Networks themselves: training recipes, describing files."""
