"""A matrix of methods and tasks: whitened layers beside the optimizers and layers that people would use instead."""
