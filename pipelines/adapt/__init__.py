"""One LoRA adapter per user, and the base that they stand on."""
