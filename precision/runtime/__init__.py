"""What every runtime has in common: sessions, engines, builds, and error sums."""
