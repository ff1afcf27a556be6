"""The entries of a run record, each made of plain values that were measured."""
