"""The engines that answer prompts, vLLM and transformers, and the adapters that they hold."""
