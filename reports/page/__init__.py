"""The parts of the HTML page, as plain values and text."""
