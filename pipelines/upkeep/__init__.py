"""Jobs that keep tables in order: compact, vacuum, restore, erase, export."""
