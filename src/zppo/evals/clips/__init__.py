"""Clips of video benchmarks: brought, unpacked, found."""
