"""From numbers to pictures: colour maps, histogram equalisation, and PNG files without an imaging library."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

from netassay.heavy import np

Colour = tuple[int, int, int]

# Two ramps that differ in hue (blue and orange stay apart for every common colour blindness) and meet in no colour.
#: Dark to light blue.
COLD: tuple[Colour, ...] = ((6, 12, 40), (16, 52, 112), (28, 110, 172), (84, 176, 214), (206, 238, 240))
#: Dark brown to light yellow.
WARM: tuple[Colour, ...] = ((44, 6, 14), (120, 22, 24), (196, 70, 22), (240, 150, 44), (254, 236, 170))
#: Of what is not known.
GREY: Colour = (206, 206, 206)


def ramp(anchors: Sequence[Colour], values: np.ndarray) -> np.ndarray:
    """Colours along evenly spaced anchors: values in [0, 1] of any shape to uint8 (..., 3)."""
    places = np.linspace(0.0, 1.0, len(anchors))
    channels = np.asarray(anchors, dtype=np.float64).T
    return np.stack([np.interp(values, places, channel) for channel in channels], axis=-1).round().astype(np.uint8)


def equalise(values: np.ndarray) -> np.ndarray:
    """Rank of each value among all, scaled to [0, 1]; equal values get their mean rank. Shape is kept.

    Sums of losses span many powers of ten; ranks show structure in all of them.
    """
    flat = np.asarray(values).ravel()
    if flat.size == 0:
        return np.zeros(np.shape(values))
    _, place, count = np.unique(flat, return_inverse=True, return_counts=True)
    last = count.cumsum() - 1
    middle = last - (count - 1) / 2
    return (middle[place] / max(flat.size - 1, 1)).reshape(np.shape(values))


def enlarge(picture: np.ndarray, pixels: int) -> np.ndarray:
    """Repeat each pixel of (rows, columns, ...) so that the longer side is at least `pixels`: edges stay sharp."""
    times = -(-pixels // max(picture.shape[:2]))
    return picture.repeat(times, axis=0).repeat(times, axis=1) if times > 1 else picture


def png(rgb: np.ndarray) -> str:
    """Base64 of the PNG file (8-bit RGB) of a picture: uint8 (rows, columns, 3), first row on top.

    Raises ValueError for another shape or dtype.
    Reference: W3C. Portable Network Graphics (PNG) Specification. 2003.
    """
    rgb = np.asarray(rgb)
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.size == 0:
        raise ValueError(f"a picture is uint8 (rows, columns, 3), not {rgb.dtype} {rgb.shape}")
    rows, columns = rgb.shape[:2]
    # Each scan line starts with its filter: 0, none. (Section 9.2.)
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), rgb.reshape(rows, 3 * columns)], axis=1)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)  # 8 bits a channel, colour type 2: RGB
    file = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header)
    file += _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)) + _chunk(b"IEND", b"")
    return base64.b64encode(file).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
