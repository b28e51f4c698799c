"""Corpora that are put together out of public sets (`zppo data build`)."""

CORPORA = ("zppo-77k",)
"""The corpora that are known by name; each has a mapping of that name in this folder."""
