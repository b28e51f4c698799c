"""Settings, methods, recipes."""
