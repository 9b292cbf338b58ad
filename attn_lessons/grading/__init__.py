"""Exercises: their catalogue, the verdict on an answer, the name of its mistake, and class runs."""
