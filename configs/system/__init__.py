"""What the operating system and Python give: locks, cores, memory, lazy imports, compiled code."""
