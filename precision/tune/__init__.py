"""Choosing ranges and pins by what they do at the output."""
