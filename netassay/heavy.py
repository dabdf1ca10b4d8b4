"""Heavy libraries, imported at first use: the only import trick in the tree.

    from netassay.heavy import np, torch

gives names that cost nothing until an attribute is read. So every method can be listed, validated and submitted by a
process that never loads PyTorch (or does not have it), and a module still reads as if it had imported the library.

Do not use these names in class bodies, default arguments or annotations that are evaluated at import time: reading
an attribute there loads the library.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


class LazyModule(ModuleType):
    """A module that imports itself when one of its attributes is first read."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__dict__["_target"] = None

    def _imported(self) -> ModuleType:
        """The library itself, imported now. Underscored because `np.load` must be the library's own.

        Raises ModuleNotFoundError, saying which extra provides it, where it is not installed.
        """
        target = self.__dict__["_target"]
        if target is None:
            try:
                target = importlib.import_module(self.__name__)
            except ModuleNotFoundError as error:
                if error.name != self.__name__.partition(".")[0]:
                    raise
                raise ModuleNotFoundError(
                    f"{error.name} is needed to compute but not installed here; try: pip install 'netassay[compute]'",
                    name=error.name,
                ) from error
            self.__dict__["_target"] = target
        return target

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__") and attribute.endswith("__"):
            # Introspection (inspect, doctest, pickle) must not load a gigabyte of library.
            raise AttributeError(attribute)
        return getattr(self._imported(), attribute)


if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnxruntime
    import scipy.optimize as scipy_optimize
    import scipy.sparse as scipy_sparse
    import sklearn.datasets as sklearn_datasets
    import torch
    import vnnlib as vnnlib_2
else:
    np = LazyModule("numpy")
    onnx = LazyModule("onnx")
    onnxruntime = LazyModule("onnxruntime")
    scipy_optimize = LazyModule("scipy.optimize")
    scipy_sparse = LazyModule("scipy.sparse")
    sklearn_datasets = LazyModule("sklearn.datasets")
    torch = LazyModule("torch")
    vnnlib_2 = LazyModule("vnnlib")

__all__ = [
    "LazyModule",
    "np",
    "onnx",
    "onnxruntime",
    "scipy_optimize",
    "scipy_sparse",
    "sklearn_datasets",
    "torch",
    "vnnlib_2",
]
