"""Who is next: adapters take turns, and within one the first to come is the first served."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """A thousand requests for one adapter do not keep the next one for another waiting."""

    def __init__(self) -> None:
        self._lines: OrderedDict[Hashable, deque[Item]] = OrderedDict()
        self._length = 0  # `len` is asked without the lock of those who push and pop

    def __len__(self) -> int:
        return self._length

    def push(self, key: Hashable, item: Item) -> None:
        """Put an item at the end of its line."""
        self._lines.setdefault(key, deque()).append(item)
        self._length += 1

    def pop(self) -> Item:
        """The first of the line whose turn it is; IndexError when nobody waits."""
        if not self._lines:
            raise IndexError("nobody waits")
        key, line = self._lines.popitem(last=False)
        item = line.popleft()
        if line:
            self._lines[key] = line
        self._length -= 1
        return item

    def take(self, wanted: Callable[[Item], bool]) -> list[Item]:
        """Remove and return all items that are `wanted`."""
        taken = [item for line in self._lines.values() for item in line if wanted(item)]
        if taken:
            kept = {key: deque(item for item in line if item not in taken) for key, line in self._lines.items()}
            self._lines = OrderedDict((key, line) for key, line in kept.items() if line)
            self._length -= len(taken)
        return taken
