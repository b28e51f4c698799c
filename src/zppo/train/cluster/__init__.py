"""Students that are not in this process."""
