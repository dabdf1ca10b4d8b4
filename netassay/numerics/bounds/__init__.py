"""Bounds on what a network can output over a set of inputs: one module an interpreter of `netassay.networks.graph`.

`regions` holds the sets, `linear` the linear maps that all interpreters share, `relaxations` the lines and planes
between which other operations lie (`curves` what they need to know of a function). `interval` has forward boxes (IBP),
`forward` forward linear bounds, `backward` backward ones (CROWN), `optimised` those with optimised slopes, `rounding`
what floating point can add to any of them. `weights` makes weights part of the input, `fusion` bounds a loss, `pruning`
drops neurons that are off, `tightness` and `milp` say what bounds are worth. Two modules know chains: `stack` makes
CROWN quick where all is dense layers and ReLUs, inside `backward`; `stages`, of any activation and with convolutions,
is what `jacobian` walks. A new operation is a rule in the table of each interpreter; a new interpreter is a new module
here.
"""
