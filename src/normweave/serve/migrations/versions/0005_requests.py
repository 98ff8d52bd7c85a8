"""The request that an inspection belongs to, and a row to test whether the database can be written."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the columns, which are empty without an Idempotency-Key, and the table."""
    op.add_column("inspections", sa.Column("request_key", sa.String(255)))
    op.add_column("inspections", sa.Column("request_hash", sa.String(64)))
    op.add_column("inspections", sa.Column("request_place", sa.Integer))
    op.create_index("inspections_request_key", "inspections", ["request_key", "id"])
    probe = op.create_table("probe", sa.Column("id", sa.Integer, primary_key=True), sa.Column("at", sa.BigInteger))
    op.bulk_insert(probe, [{"id": 1, "at": 0}])
