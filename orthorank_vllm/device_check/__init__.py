"""One command for a machine with a GPU: is OrthoRank right there, and how fast."""
