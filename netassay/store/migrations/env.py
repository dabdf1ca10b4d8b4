"""Alembic's entry: runs the migrations within one write transaction of the store.

Workers of before know other tables than there are now: they are given up, and what they hold goes back.
"""

from __future__ import annotations

from alembic import context

from netassay.store import dispatching, tables

with context.config.attributes["database"].write(durable=True) as connection:
    context.configure(connection=connection, target_metadata=tables.metadata, transactional_ddl=False)
    context.run_migrations()
    dispatching.retire_workers(connection)
