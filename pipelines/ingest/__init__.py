"""The way from people's files to the tables of a population."""
