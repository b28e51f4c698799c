"""The measurement before training: how often student and teacher are right on the questions of a recipe (`zppo data measure`)."""
