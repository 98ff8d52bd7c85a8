"""Alembic migrations of the store, one file for each revision in `versions`; released ones are never edited.

A change of the tables, for example by a field of `Outcome`, needs a new revision, written by hand. A test compares the
result of all migrations with `tables.METADATA`.
"""
