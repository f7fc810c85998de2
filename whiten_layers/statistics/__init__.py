"""What a layer's inputs and output gradients are like: sampled rows, their covariance, and its inverse."""
