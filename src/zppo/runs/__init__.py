"""The run folder: files, lock, checkpoints, logs, trackers, display, signals."""
