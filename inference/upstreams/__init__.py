"""Connections to providers. Each upstream turns a call into an `Answer`; nothing here knows callers or limits."""
