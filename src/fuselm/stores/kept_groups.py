"""Keep row groups in memory that were read recently, up to a number of tokens."""

from collections import OrderedDict
from collections.abc import Callable, Hashable

from fuselm.stores.rows import RowGroup


class KeptGroups:
    """Hold the row groups that were read last, of up to `most_tokens` tokens together, and always the last one."""

    def __init__(self, most_tokens: int):
        self._most_tokens = most_tokens
        self._groups: OrderedDict[Hashable, RowGroup] = OrderedDict()  # least recently read first
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def tokens(self) -> int:
        """Return how many tokens are held."""
        return self._tokens

    def find(self, key: Hashable, read: Callable[[], RowGroup]) -> RowGroup:
        """Return a row group, which is read if it is not here."""
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        rows = self._groups[key] = read()
        self._tokens += rows.tokens
        while len(self._groups) > 1 and self._tokens > self._most_tokens:
            self._tokens -= self._groups.popitem(last=False)[1].tokens
        return rows
