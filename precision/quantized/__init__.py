"""Models that are quantized already: found, linted, repaired, imported, stripped, migrated."""
