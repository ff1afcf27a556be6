"""trtune: quantization and precision-tuning workbench for NVIDIA TensorRT."""

__version__ = "0.1.0"
