"""Bounds on what a network can output over a set of inputs: one module an interpreter of `netassay.networks.graph`.

`regions` holds the sets, `linear` the linear maps that all interpreters share, `interval` forward boxes (IBP),
`backward` linear lower bounds (CROWN), `rounding` what floating point can add to any of them. `stack` has chains as
stages between activations, `jacobian` bounds their derivatives. A new operation is a rule in the table of each
interpreter; a new interpreter (forward linear bounds, optimised slopes) is a new module here.
"""
