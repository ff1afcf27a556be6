"""Which node runs in which precision, and which tensors carry scales."""
