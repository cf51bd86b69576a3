"""The shared fixtures."""

from tiny_run import tiny, trained

__all__ = ["tiny", "trained"]
