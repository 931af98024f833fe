"""The version, written once: pyproject.toml reads it when the package is built, a program when it asks.

A literal, because a copy of the package without its .dist-info (vendored, frozen, a build tree) has a version too, and because
importlib.metadata takes longer to import than the rest of the package.
"""

__version__ = "0.1.0"
