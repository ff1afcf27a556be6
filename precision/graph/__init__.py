"""The ONNX graph: files, normal form, folding, and an index over nodes and tensors."""
