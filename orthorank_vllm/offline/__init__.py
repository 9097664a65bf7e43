"""A loaded model without an engine around it."""
