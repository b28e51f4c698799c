"""Student (and in-process teacher) sampling: token ids in, token ids and log-probabilities out."""
