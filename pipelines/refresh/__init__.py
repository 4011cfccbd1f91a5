"""Vectors of new texts, personas of changed users."""
