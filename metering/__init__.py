"""What was used, what it costs, what may still be spent: intents, the ledger, prices, budgets and their summaries.

Owns money. Knows nothing of HTTP, providers or models beyond their names. May import `core` and `keys`.
"""
