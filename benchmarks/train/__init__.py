"""One training program for CIFAR, ImageNet and the images that a dependency ships: ``python -m benchmarks.train``.

options, presets     the command line
datasets, batches    images, their augmentations, their order: functions of seed, epoch and image
network, optimizing  what is trained, and how
world                the processes that train it together, and the signals that stop them
run                  the loop; state and checkpoint are one thing
record               what is written: checkpoint, results.json, curves, TensorBoard
"""
