"""Statistics of a layer's inputs and output gradients: sampled rows, their covariance, and its inverse."""
