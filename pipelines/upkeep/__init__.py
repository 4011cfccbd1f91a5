"""Jobs that keep tables in order: compact, vacuum, restore, migrate, erase, export."""
