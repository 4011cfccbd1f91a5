"""Scores, intervals, and what they allow to claim."""
