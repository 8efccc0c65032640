"""The version of what is running."""

from typing import Final

VERSION: Final = "0.1.0"
