"""The routes that Litestar serves: everything but the hot ones."""
