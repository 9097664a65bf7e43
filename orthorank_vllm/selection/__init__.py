"""The method: which rows of a batch a selective layer computes. Knows nothing of vLLM."""
