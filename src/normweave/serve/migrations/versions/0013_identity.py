"""What identifies the database, also one that is restored from a backup."""

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    """Draw it."""
    identity = op.create_table("identity", sa.Column("id", sa.String(32), primary_key=True))
    op.bulk_insert(identity, [{"id": uuid.uuid4().hex}])
