"""How far each output of a line has delivered the inspections, and what its counterpart has refused."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"

NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "deliveries",
        sa.Column("line", sa.String(255), primary_key=True),
        sa.Column("name", sa.String(255), primary_key=True),
        sa.Column("last_id", sa.BigInteger, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("last_error", sa.String(4000)),
        sa.Column("last_success_at", sa.BigInteger),
        sa.Column("removed", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "dead_letters",
        sa.Column("id", NUMBER, primary_key=True),
        sa.Column("line", sa.String(255), nullable=False),
        sa.Column("output", sa.String(255), nullable=False),
        sa.Column("inspection", sa.BigInteger, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.String(4000), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("again", sa.Boolean, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("dead_letters_output", "dead_letters", ["line", "output", "id"])
