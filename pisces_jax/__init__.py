"""pisces_jax: unified models that read and draw pictures, in JAX."""

__version__ = "0.1.0"
