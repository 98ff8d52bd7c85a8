"""Images that are stored together: those of one request that show one part, on whichever server of the line."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Together(Generic[T]):
    """Collects what must be stored in one transaction, so that no other server sees a part of it.

    One thread calls it.

    Args:
        count: number of items.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._items: list[T] = []

    def add(self, item: T) -> list[T]:
        """Add an item, and return all of them with the last one; before, none."""
        self._items.append(item)
        if len(self._items) < self._count:
            return []
        # Nothing is kept: an item that refers to this object would stay in memory until the garbage collection.
        items, self._items = self._items, []
        return items
