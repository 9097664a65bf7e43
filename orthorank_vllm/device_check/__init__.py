"""One command for a machine with a GPU: whether OrthoRank is right there, and how fast it is."""
