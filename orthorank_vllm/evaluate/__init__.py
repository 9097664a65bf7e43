"""`orthorank evaluate`: what a ratio costs in quality, and what else would cost as much."""
