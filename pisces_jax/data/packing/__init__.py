"""From examples to packed rows: layout, lengths, the index, rows and the Grain pipeline."""
