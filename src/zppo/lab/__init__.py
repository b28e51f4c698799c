"""The tiny offline world."""
