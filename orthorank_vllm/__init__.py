"""OrthoRank for vLLM: prefill computes only the tokens that are still moving.

Method: Shin, Oh and Oh, "OrthoRank", ICML 2025, arXiv 2507.03865.
"""

__version__ = "0.1.0"
