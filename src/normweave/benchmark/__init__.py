"""How well a detector detects: data sets x protocols x seeds, one command a table."""
