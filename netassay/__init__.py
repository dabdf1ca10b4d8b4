"""netassay: a bulk laboratory for neural networks.

The laboratory itself: what can be asked of a network and how it is computed. This package knows nothing of queues;
`producer` puts jobs in and takes records out, `worker` runs them.
"""

__version__ = "0.1.0"
