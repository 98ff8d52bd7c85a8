"""Audit table, server-side sessions, the token and the line of each record, and names of up to 500 characters."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0002"

NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")

SQLITE = """
CREATE TRIGGER audit_{event} BEFORE {event} ON audit {condition}
BEGIN SELECT RAISE(ABORT, 'entries of the audit table are never changed or removed'); END
"""
POSTGRESQL = (
    "CREATE FUNCTION audit_refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION "
    "'entries of the audit table are never changed or removed'; END $$",
    "CREATE TRIGGER audit_change BEFORE UPDATE OR DELETE ON audit FOR EACH ROW EXECUTE FUNCTION audit_refuse()",
    "CREATE TRIGGER audit_truncate BEFORE TRUNCATE ON audit FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse()",
)


def upgrade() -> None:
    """Create the tables, and add the columns; earlier records have no token and no line."""
    op.create_table(
        "audit",
        sa.Column("id", NUMBER, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("event", sa.String(255), nullable=False),
        sa.Column("actor", sa.String(255), nullable=False),
        sa.Column("token", sa.BigInteger),
        sa.Column("address", sa.String(255), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("line", sa.String(255), nullable=False),
        sqlite_autoincrement=True,
    )
    if op.get_bind().dialect.name == "postgresql":
        for statement in POSTGRESQL:
            op.execute(statement)
        op.alter_column("inspections", "name", type_=sa.String(500))
        op.alter_column("inspections", "image_path", type_=sa.String(500))
    else:  # SQLite does not enforce the length of a text
        for event, condition in {
            "UPDATE": "",
            "DELETE": "",
            # INSERT OR REPLACE removes a row without a DELETE trigger
            "INSERT": "WHEN EXISTS (SELECT 1 FROM audit WHERE id = NEW.id)",
        }.items():
            op.execute(SQLITE.format(event=event, condition=condition))
    op.create_table(
        "sessions",
        sa.Column("id", NUMBER, primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False, unique=True),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("used_at", sa.BigInteger, nullable=False),
        sqlite_autoincrement=True,
    )
    op.add_column("inspections", sa.Column("token", sa.BigInteger))
    op.add_column("inspections", sa.Column("line", sa.String(255), nullable=False, server_default=""))
    op.add_column("inspections", sa.Column("reviewer_token", sa.BigInteger))
    op.add_column("reviews", sa.Column("token", sa.BigInteger))
