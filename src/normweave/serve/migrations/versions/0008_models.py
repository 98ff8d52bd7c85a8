"""The active bundle and the candidates of each line, and the outcomes of candidates."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "activations",
        sa.Column("id", NUMBER, primary_key=True),
        sa.Column("line", sa.String(255), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("bundle_hash", sa.String(64), nullable=False),
        sa.Column("before", sa.BigInteger),
        sa.Column("actor", sa.String(255), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("activations_line", "activations", ["line", "id"])
    op.create_table(
        "shadows",
        sa.Column("id", NUMBER, primary_key=True),
        sa.Column("line", sa.String(255), nullable=False),
        sa.Column("bundle_hash", sa.String(64), nullable=False),
        sa.Column("active_hash", sa.String(64), nullable=False),
        sa.Column("started_at", sa.BigInteger, nullable=False),
        sa.Column("ended_at", sa.BigInteger),
        sa.Column("actor", sa.String(255), nullable=False),
        sa.Column("failure", sa.String(4000)),
        sa.Column("skipped", sa.BigInteger, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("shadows_line", "shadows", ["line", "id"])
    op.create_table(
        "shadow_outcomes",
        sa.Column("id", NUMBER, primary_key=True),
        sa.Column("inspection", NUMBER, sa.ForeignKey("inspections.id", ondelete="CASCADE"), nullable=False),
        sa.Column("line", sa.String(255), nullable=False),
        sa.Column("verdict", sa.String(255)),
        sa.Column("pred_score", sa.Float(53)),
        sa.Column("p_value", sa.Float(53)),
        sa.Column("threshold", sa.Float(53)),
        sa.Column("category", sa.String(255)),
        sa.Column("subclass", sa.String(255)),
        sa.Column("unseen", sa.Boolean, nullable=False),
        sa.Column("boxes", sa.Text, nullable=False),
        sa.Column("model", sa.String(255)),
        sa.Column("bundle_hash", sa.String(255)),
        sa.Column("error", sa.String(4000)),
        sa.Column("tiles", sa.Text),
        sa.Column("smoothing", sa.Float(53)),
        sa.Column("map_threshold", sa.Float(53)),
        sa.Column("grids", sa.LargeBinary),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_shadow_outcomes_inspection", "shadow_outcomes", ["inspection"])
    op.create_index("shadow_outcomes_bundle_hash", "shadow_outcomes", ["bundle_hash", "inspection"])
