"""The first schema: `Database.prepare` creates it from `netassay.store.tables`."""

from __future__ import annotations

from alembic import op

from netassay.store import tables

revision = "0001"
down_revision = None


def upgrade() -> None:
    tables.create(op.get_bind())
