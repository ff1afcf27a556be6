"""Method `auto`: which range for each tensor, by what it does to the network's output."""
