"""Other ways to write quantization, put into one: pairs of QuantizeLinear and DequantizeLinear."""
