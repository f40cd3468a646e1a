"""Data sets, partitions, supervision and augmentation."""
