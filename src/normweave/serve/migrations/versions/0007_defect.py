"""Name of the defect of each review."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Add the columns; earlier reviews name no defect."""
    op.add_column("inspections", sa.Column("defect", sa.String(255)))
    op.add_column("reviews", sa.Column("defect", sa.String(255), nullable=False, server_default=""))
    op.execute("UPDATE inspections SET defect = '' WHERE decision IS NOT NULL")
