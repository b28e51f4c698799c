"""The method alone: pure functions and small frozen types on the standard library and torch."""
