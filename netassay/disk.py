"""Whether a disk is so full that work should wait until somebody has made room."""

from __future__ import annotations

import shutil
from pathlib import Path

#: Results of the chunks under way, logs and a journal find room in this; of a small disk a part is kept free.
RESERVE_BYTES, RESERVE_SHARE = 256 << 20, 0.05
#: With fewer free bytes than this a disk is not well: it is soon used up.
ROOM = 1_000_000_000


def is_short(folder: Path) -> bool:
    """Whether the disk that holds this folder has less room left than is kept free. A folder that is not there: no."""
    try:
        total, _, free = shutil.disk_usage(folder)
    except OSError:
        return False
    return free < min(RESERVE_BYTES, RESERVE_SHARE * total)
