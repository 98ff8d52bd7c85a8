"""How far each output has delivered verdicts on parts and alarms of drift, besides inspections; alarms are stored."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Create the tables, and move the cursors of inspections."""
    op.create_table(
        "delivery_cursors",
        sa.Column("line", sa.String(255), primary_key=True),
        sa.Column("name", sa.String(255), primary_key=True),
        sa.Column("subject", sa.String(255), primary_key=True),
        sa.Column("last_id", sa.BigInteger, nullable=False),
        sa.Column("removed", sa.BigInteger, nullable=False),
    )
    op.execute(
        "INSERT INTO delivery_cursors (line, name, subject, last_id, removed) "
        "SELECT line, name, 'inspections', last_id, removed FROM deliveries"
    )
    for table, column in (("deliveries", "last_id"), ("deliveries", "removed"), ("dead_letters", "inspection")):
        op.drop_column(table, column)
    op.create_table(
        "drift_alarms",
        sa.Column("id", NUMBER, primary_key=True),
        sa.Column("line", sa.String(255), nullable=False),
        sa.Column("time", sa.BigInteger, nullable=False),
        sa.Column("bundle_hash", sa.String(64), nullable=False),
        sa.Column("cause", sa.String(255), nullable=False),
        sa.Column("subclass", sa.String(510), nullable=False),
        sa.Column("since", sa.String(255), nullable=False),
        sa.Column("since_inspection", sa.BigInteger, nullable=False),
        sa.Column("evidence", sa.Float(53)),
        sa.Column("effect", sa.String(4000), nullable=False),
        sa.Column("advice", sa.String(4000), nullable=False),
        sa.Column("inspections", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
