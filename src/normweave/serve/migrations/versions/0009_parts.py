"""Parts of several views: which part an image shows, and the verdicts on closed parts."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")
CLOSED = sa.text("part IS NOT NULL")
OPEN = sa.text("part_id IS NOT NULL AND part IS NULL")


def upgrade() -> None:
    """Add the columns and the table; inspections of earlier versions show no part."""
    op.add_column("inspections", sa.Column("part_id", sa.String(500)))
    op.add_column("inspections", sa.Column("view", sa.String(500)))
    op.add_column("inspections", sa.Column("part", sa.BigInteger))
    for name, first, where in (("inspections_part", "part", CLOSED), ("inspections_open_part", "line", OPEN)):
        op.create_index(name, "inspections", [first, "id"], sqlite_where=where, postgresql_where=where)
    op.create_table(
        "parts",
        sa.Column("id", NUMBER, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("part_id", sa.String(500), nullable=False),
        sa.Column("line", sa.String(255), nullable=False),
        sa.Column("verdict", sa.String(255), nullable=False),
        sa.Column("reasons", sa.Text, nullable=False),
        sa.Column("images", sa.Integer, nullable=False),
        sa.Column("expected", sa.Text),
        sa.Column("corrects", sa.BigInteger),
        sqlite_autoincrement=True,
    )
    op.create_index("parts_part_id", "parts", ["part_id", "id"])
    op.create_index("parts_corrects", "parts", ["corrects", "id"])
    op.create_index("parts_at", "parts", ["at"])
