"""The statistics of an image that `normweave drift` compares."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

COLUMNS = ("brightness", "contrast", "warmth", "tint", "sharpness", "map_level", "peak_x", "peak_y")


def upgrade() -> None:
    """Add the columns; inspections of earlier versions have no values."""
    for name in COLUMNS:
        op.add_column("inspections", sa.Column(name, sa.Float(53)))
