"""`orthorank calibrate`: which layers cost least quality when they are selective."""
