"""A vLLM model, walked sparsely."""
