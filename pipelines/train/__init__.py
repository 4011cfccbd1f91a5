"""A plug, fitted on many users."""
