"""Replies, for one or several methods."""
