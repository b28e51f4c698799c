"""Scores: by rule, by metric, by judge."""
