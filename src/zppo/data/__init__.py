"""Questions in."""
