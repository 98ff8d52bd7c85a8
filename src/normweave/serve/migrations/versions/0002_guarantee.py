"""The guarantee of the false-alarm rate."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column; inspections of earlier versions have no value."""
    op.add_column("inspections", sa.Column("guarantee", sa.String(255)))
