"""The elementwise functions of a graph's `Activation`, in PyTorch: name -> f(x, *parameters).

Parameters: `elu` its alpha (> 0); `power` its exponent (an integer, or any number where x is positive). All others have
none. Each is differentiable by autograd where the function is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from netassay.heavy import torch
from netassay.networks.graph import Function

if TYPE_CHECKING:
    from torch import Tensor


def _elu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0)))


def _gelu(x: Tensor) -> Tensor:
    # erfc keeps its digits where x is far below 0; 1 + erf cancels.
    return 0.5 * x * torch.erfc(-x / math.sqrt(2))


def _gelu_tanh(x: Tensor) -> Tensor:
    # 0.044715: Hendrycks, Gimpel. Gaussian error linear units. 2016. 0.5 (1 + tanh(v)) = sigmoid(2 v), which keeps its
    # digits far below 0.
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def _softplus(x: Tensor) -> Tensor:
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


FUNCTIONS: dict[Function, Callable[..., Tensor]] = {
    "cos": lambda x: torch.cos(x),
    "elu": _elu,
    "erf": lambda x: torch.erf(x),
    "exp": lambda x: torch.exp(x),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "hard_swish": lambda x: x * (x / 6 + 0.5).clamp(0, 1),
    "log": lambda x: torch.log(x),
    "mish": lambda x: x * torch.tanh(_softplus(x)),
    "power": lambda x, exponent: x**exponent,
    "reciprocal": lambda x: 1 / x,
    "sigmoid": lambda x: torch.sigmoid(x),
    "sign": lambda x: torch.sign(x),
    "silu": lambda x: x * torch.sigmoid(x),
    "sin": lambda x: torch.sin(x),
    "softplus": _softplus,
    "sqrt": lambda x: torch.sqrt(x),
    "tanh": lambda x: torch.tanh(x),
}
