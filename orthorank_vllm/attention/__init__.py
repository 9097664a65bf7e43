"""Queries with positions of their own over vLLM's pages; all ways are exact."""
