"""31 benchmarks under one protocol (method.md section 10): where they are, how their rows are asked, how answers are scored."""

from __future__ import annotations
