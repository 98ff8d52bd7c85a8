"""Where an image shows the part that a region of interest follows."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"

COLUMNS = ("shift_x", "shift_y", "rotation", "correlation")


def upgrade() -> None:
    """Add the columns; inspections of earlier versions have no values."""
    for name in COLUMNS:
        op.add_column("inspections", sa.Column(name, sa.Float(53)))
