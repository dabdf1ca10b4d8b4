"""Alembic migrations of the store's tables; run by `Database.prepare`, never by hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alembic.config import Config

    from netassay.store.database import Database


def config(database: Database) -> Config:
    """Alembic's configuration for this store, without an ini file."""
    from alembic.config import Config

    result = Config()
    result.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    result.attributes["database"] = database
    return result
