"""One training program for CIFAR, ImageNet and the images that a dependency ships: ``python -m benchmarks.train``.

options, presets, command_line   the typed options, recipes for them, and how they are read and checked
datasets, batches                images, their augmentations and their order, as functions of seed, epoch and image
network, optimizing              the network, its optimizer and its learning rate
world                            the processes that train together, and the signals that stop them
run                              the training loop, whose whole state is its checkpoint
record                           the files: checkpoint, results.json, curves, TensorBoard
"""
