"""Puts jobs in and takes records out: command line, sweeps, submission, dispatch, results, the embedded lab."""
