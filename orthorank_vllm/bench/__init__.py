"""Measurements of real servers over HTTP; nothing here imports vLLM."""
