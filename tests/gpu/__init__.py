"""The GPU tier from outside: real mounts, real processes, and an emulated CUDA driver."""
