"""Turning a model's layers into their whitened twins and back, and what has to be known of the model for that."""
