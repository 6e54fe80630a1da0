"""Sizes as people read them."""

GIB = 2**30


def gib(size: float) -> str:
    """Bytes in GiB: `1.50 GiB`."""
    return f"{size / GIB:.2f} GiB"
