"""One migration per change, named by what it does."""
