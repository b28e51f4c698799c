"""What a run is told: settings, methods, recipes."""
