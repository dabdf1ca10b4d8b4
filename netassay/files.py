"""Files that users bring: read whole and within a limit, gzip opened on the way."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path

_GZIP = b"\x1f\x8b"
_BLOCK = 1 << 20


class Unreadable(ValueError):
    """A file that holds, or would unpack to, more bytes than are read, or whose archive is damaged."""


def read(path: Path, limit: int) -> bytes:
    """The bytes of a file; of one in gzip format (told by its first bytes, whatever its name) the unpacked ones.

    Never holds more than `limit` bytes and one block. Raises Unreadable beyond it and for a damaged archive, OSError.
    """
    with open(path, "rb") as stream:
        packed = stream.read(2) == _GZIP
        stream.seek(0)
        source = gzip.GzipFile(fileobj=stream) if packed else stream
        # A plain file is as large as its folder says: refused before a byte is read, and else read in one piece, as
        # pieces put together take twice the memory.
        size = 0 if packed else os.fstat(stream.fileno()).st_size
        if size > limit:
            raise _too_large(packed, limit)
        blocks, total = [], 0
        try:
            while block := source.read(max(_BLOCK, size - total)):
                total += len(block)
                if total > limit:
                    raise _too_large(packed, limit)
                blocks.append(block)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Unreadable(f"the gzip archive is damaged or cut ({error})") from None
    return b"".join(blocks)


def _too_large(packed: bool, limit: int) -> Unreadable:
    verb = "unpacks to" if packed else "holds"
    return Unreadable(f"the file {verb} more than {limit / 2**20:,.0f} MiB, which is the most that is read")
