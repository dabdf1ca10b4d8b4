"""`python -m producer.cli`: the same as `netassay`."""

from producer.cli import main

main()
