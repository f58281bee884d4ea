"""Models in the memory of GPUs, as tensors of this process."""
