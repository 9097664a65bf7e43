"""`orthorank doctor`: what is wrong with an installation or a running server, and the mend."""
