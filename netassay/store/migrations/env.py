"""Alembic's entry: runs the migrations within one write transaction of the store."""

from __future__ import annotations

from alembic import context

from netassay.store import tables

with context.config.attributes["database"].write(durable=True) as connection:
    context.configure(connection=connection, target_metadata=tables.metadata, transactional_ddl=False)
    context.run_migrations()
