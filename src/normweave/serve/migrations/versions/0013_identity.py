"""What identifies the database, also one that is restored from a backup."""

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    """Take it from the first token, so that a backup of an earlier version has the same; without one, draw it."""
    digest = op.get_bind().execute(sa.text("SELECT digest FROM tokens ORDER BY id LIMIT 1")).scalar()
    identity = op.create_table("identity", sa.Column("id", sa.String(32), primary_key=True))
    drawn = uuid.uuid4() if digest is None else uuid.uuid5(uuid.NAMESPACE_OID, digest)
    op.bulk_insert(identity, [{"id": drawn.hex}])
