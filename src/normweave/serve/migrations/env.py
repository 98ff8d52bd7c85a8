"""Environment of Alembic: `Database.open` passes a connection inside a transaction, which it commits itself."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
