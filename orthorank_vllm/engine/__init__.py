"""Serving: every place where vLLM's engine is touched."""
