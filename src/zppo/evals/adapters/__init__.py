"""From the rows of a data set, in its own schema, to items: one small pure function per benchmark."""

from __future__ import annotations
