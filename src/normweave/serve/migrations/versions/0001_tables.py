"""First tables of the store."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Create the tables in an empty database."""
    op.create_table(
        "inspections",
        sa.Column("id", NUMBER, primary_key=True),
        sa.Column("received_at", sa.BigInteger, nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("source", sa.String(255), nullable=False),
        sa.Column("actor", sa.String(255), nullable=False),
        sa.Column("routed", sa.Integer),
        sa.Column("image_path", sa.String(255)),
        sa.Column("verdict", sa.String(255)),
        sa.Column("pred_score", sa.Float(53)),
        sa.Column("p_value", sa.Float(53)),
        sa.Column("threshold", sa.Float(53)),
        sa.Column("false_alarm_rate", sa.Float(53)),
        sa.Column("category", sa.String(255)),
        sa.Column("subclass", sa.String(255)),
        sa.Column("subclass_distance", sa.Float(53)),
        sa.Column("subclass_p_value", sa.Float(53)),
        sa.Column("unseen", sa.Boolean, nullable=False),
        sa.Column("experts", sa.Text, nullable=False),
        sa.Column("adapted", sa.Boolean, nullable=False),
        sa.Column("boxes", sa.Text, nullable=False),
        sa.Column("height", sa.Integer),
        sa.Column("width", sa.Integer),
        sa.Column("latency_ms", sa.Float(53)),
        sa.Column("model", sa.String(255)),
        sa.Column("bundle_hash", sa.String(255)),
        sa.Column("error", sa.String(4000)),
        sa.Column("image_hash", sa.String(64)),
        sa.Column("image_type", sa.String(255)),
        sa.Column("image_bytes", sa.BigInteger),
        sa.Column("grids_hash", sa.String(64)),
        sa.Column("grids_bytes", sa.BigInteger),
        sa.Column("tiles", sa.Text),
        sa.Column("smoothing", sa.Float(53)),
        sa.Column("map_threshold", sa.Float(53)),
        sa.Column("decision", sa.String(255)),
        sa.Column("reviewed_at", sa.BigInteger),
        sa.Column("reviewer", sa.String(255)),
        sa.Column("comment", sa.String(4000)),
        sqlite_autoincrement=True,
    )
    for name, columns in {
        "received_at": ["received_at"],
        "verdict": ["verdict", "id"],
        "name": ["name", "id"],
        "decision": ["decision", "id"],
        "bundle_hash": ["bundle_hash", "id"],
        "image_hash": ["image_hash", "id", "image_bytes"],
        "grids_hash": ["grids_hash", "id", "grids_bytes"],
    }.items():
        op.create_index(f"inspections_{name}", "inspections", columns)
    op.create_table(
        "reviews",
        sa.Column("id", NUMBER, primary_key=True),
        sa.Column(
            "inspection",
            NUMBER,
            sa.ForeignKey("inspections.id", ondelete="CASCADE"),
            nullable=False,
            index=True,
        ),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("decision", sa.String(255), nullable=False),
        sa.Column("reviewer", sa.String(255), nullable=False),
        sa.Column("comment", sa.String(4000), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "tokens",
        sa.Column("id", NUMBER, primary_key=True),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("role", sa.String(255), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False, unique=True),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("revoked_at", sa.BigInteger),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "rates",
        sa.Column("id", NUMBER, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("bundle_hash", sa.String(255), nullable=False),
        sa.Column("false_alarm_rate", sa.Float(53), nullable=False),
        sa.Column("actor", sa.String(255), nullable=False),
        sqlite_autoincrement=True,
    )
