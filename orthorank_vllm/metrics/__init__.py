"""The `orthorank_*` metrics: counted in the workers, shown on the server's `/metrics`."""
