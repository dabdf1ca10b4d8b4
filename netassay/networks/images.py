"""Images of a dataset as a classifier reads them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from netassay import data
from netassay.heavy import np, torch
from netassay.method import InvalidInput, NotApplicable
from netassay.networks.graph import Graph

if TYPE_CHECKING:
    from torch import Tensor


def labelled(graph: Graph, dataset: str, split: str, index: int, clip: bool) -> tuple[Tensor, int]:
    """The image in the shape the network wants, float64, and its label. clip: its ball is cut with [0, 1].

    Raises InvalidInput where there is no such image, or network and image do not fit; NotApplicable for one output.
    """
    try:
        data.check_index(dataset, split, index)
    except ValueError as error:
        raise InvalidInput("the image does not exist", str(error)) from None
    images = data.load(dataset, split)
    x, label = torch.from_numpy(np.array(images.x[index], dtype=np.float64)), int(images.y[index])
    outputs = math.prod(graph.output_shape)
    if x.numel() != math.prod(graph.input_shape):
        raise InvalidInput(
            f"the network does not take {data.called(dataset)}",
            f"its input has the shape {graph.input_shape}, an image {tuple(x.shape)}",
            "another dataset, or a network trained on this one",
        )
    if clip and not 0.0 <= float(x.min()) <= float(x.max()) <= 1.0:
        raise InvalidInput(
            f"image {index} of {data.called(dataset)} does not lie in [0, 1]",
            f"its values go from {float(x.min()):g} to {float(x.max()):g}, and the ball is cut with [0, 1]",
            "clip: false, or scale: minmax for the dataset",
        )
    if outputs < 2:
        raise NotApplicable("the network has one output, so there are no classes to keep apart")
    if label >= outputs:
        raise InvalidInput(
            f"image {index} has the label {label}, but the network has {outputs} outputs",
            what_to_try="a network for this dataset",
        )
    return x.reshape(graph.input_shape), label
