"""What answers prompts: vLLM or transformers, and the adapters that it holds."""
