"""The schema, step by step. Expand, backfill, contract: a running older process must keep working."""
