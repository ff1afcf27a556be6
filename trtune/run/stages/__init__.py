"""The stages: each takes plain values and says what it needs, how it is made and kept."""
