"""Forms in which people keep histories, one module each."""
