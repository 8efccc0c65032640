"""What every floor stands on: settings, errors, ids, time, the stores' connections, logs and metrics.

Owns no tenant, no model and no invoice. Imports nothing of ours.
"""
