"""Flow matching, and the other losses."""
