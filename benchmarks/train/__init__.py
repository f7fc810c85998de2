"""One training program for CIFAR, ImageNet, UCF101, HMDB51 and shipped images: ``python -m benchmarks.train``.

options, presets, command_line   the typed options, recipes for them, and how they are read and checked
datasets, batches                images, their augmentations and their order, as functions of seed, epoch and image
video, video_splits              clips of compressed files and their residuals; the files of video data sets
network, optimizing              the network, its optimizer and its learning rate
distillation                     a trained network as a teacher
world                            the processes that train together, and the signals that stop them
run                              the training loop, whose whole state is its checkpoint
record                           the files: checkpoint, results.json, curves, TensorBoard
"""
