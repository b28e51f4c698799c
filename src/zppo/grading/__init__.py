"""From a completion to a verdict (method.md section 7)."""
