"""What TensorRT leaves behind, read: names of layers and tensors, caches, pins, plans, logs."""
