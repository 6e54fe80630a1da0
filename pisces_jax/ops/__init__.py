"""Operations on arrays: attention and its backends, products with sharded parameters, cross-entropy in blocks."""
