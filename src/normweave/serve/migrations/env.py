"""Alembic's way in: `Store.open` hands over a connection in a transaction, and ends that itself."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
