"""TensorRT-RTX, a process a build."""
