"""Flow matching and the other objectives."""
