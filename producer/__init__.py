"""Puts jobs in and takes records out: command line, Python API, sweeps, submission, dispatcher, figures, the lab.

The names below are the Python API (`producer.client`); importing them loads neither torch nor a database.
"""

from netassay.errors import UserError
from producer.client import (
    Batch,
    batch,
    batches,
    down,
    logs,
    method,
    methods,
    results,
    run,
    running_lab,
    status,
    submit,
    up,
)

__all__ = [
    "Batch",
    "UserError",
    "batch",
    "batches",
    "down",
    "logs",
    "method",
    "methods",
    "results",
    "run",
    "running_lab",
    "status",
    "submit",
    "up",
]
