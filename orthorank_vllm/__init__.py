"""OrthoRank for vLLM."""
