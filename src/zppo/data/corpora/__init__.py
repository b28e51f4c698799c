"""Corpora that are put together out of public sets (`zppo data build`)."""
