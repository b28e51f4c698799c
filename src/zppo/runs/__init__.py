"""The run folder: files, checkpoints, logs, trackers, display, signals."""
