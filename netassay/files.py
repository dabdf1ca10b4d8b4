"""Files that users bring: read whole and within a limit, gzip opened on the way."""

from __future__ import annotations

import gzip
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
        blocks, total = [], 0
        try:
            while block := source.read(_BLOCK):
                total += len(block)
                if total > limit:
                    raise Unreadable(
                        f"the file {'unpacks to' if packed else 'holds'} more than {limit / 2**20:,.0f} MiB, which is "
                        "the most that is read"
                    )
                blocks.append(block)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Unreadable(f"the gzip archive is damaged or cut ({error})") from None
    return b"".join(blocks)
