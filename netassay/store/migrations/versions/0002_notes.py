"""Batches have notes, a lab has an id."""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("batch", sa.Column("note", sa.Text, nullable=False, server_default=""))
    lab = sa.table("lab", sa.column("name"), sa.column("value"))
    op.bulk_insert(lab, [{"name": "id", "value": secrets.randbits(48)}])
