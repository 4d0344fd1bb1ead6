"""Numbers as people read them."""

from __future__ import annotations


def in_units(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
