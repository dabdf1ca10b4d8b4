"""Batches have submitters and tags, submitters a share; workers say what they know, have and lack."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.add_column("batch", sa.Column("submitter", sa.Text, nullable=False, server_default=""))
    op.add_column("batch", sa.Column("tags", sa.Text, nullable=False, server_default=""))
    op.create_table(
        "submitter",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("weight", sa.Float, nullable=False),
    )
    op.create_table(
        "worker_lack",
        sa.Column("worker_id", _Id, primary_key=True, autoincrement=False),
        sa.Column("method_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("reason", sa.Text, nullable=False),
    )
    # It held seconds a job, and is seconds for each predicted second now.
    op.execute("UPDATE method_version SET seconds = NULL")
    with op.batch_alter_table("worker", table_kwargs={"sqlite_autoincrement": True}) as worker:
        worker.add_column(sa.Column("memory", sa.BigInteger, nullable=False, server_default="0"))
        worker.add_column(sa.Column("schema", sa.Text, nullable=False, server_default="0002"))
    # Without a default: a worker of before, which does not name it, cannot sign on any more.
    with op.batch_alter_table("worker", table_kwargs={"sqlite_autoincrement": True}) as worker:
        worker.alter_column("schema", server_default=None)
