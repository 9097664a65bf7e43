"""The command `orthorank`, and what its parts share."""
