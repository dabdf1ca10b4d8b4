"""The shared records and artifacts of a lab."""
