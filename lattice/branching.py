"""Texts that begin alike share a row: what they have in common once, then what each goes on with.

Such a row is one of `LanguageModel.hidden_states` with `branches`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, pairwise, takewhile

Text = tuple[int, ...]
SAVED = 0.25
"""Of what a text costs in a row of its own, so much must be saved for it to join another row."""


@dataclass(frozen=True)
class Row:
    """Texts with their first `shared` tokens in common."""

    texts: tuple[Text, ...]
    shared: int

    @property
    def _ends(self) -> list[Text]:
        return [text[self.shared :] for text in self.texts]

    @property
    def size(self) -> int:
        """Tokens."""
        return self.shared + sum(len(text) - self.shared for text in self.texts)

    @property
    def ids(self) -> list[int]:
        return [*self.texts[0][: self.shared], *chain(*self._ends)]

    @property
    def branches(self) -> list[int]:
        """Of each token the number of its text, from 1 on; 0 for what all texts share."""
        numbered = ([number] * len(end) for number, end in enumerate(self._ends, 1))
        return [0] * self.shared + list(chain(*numbered))

    @property
    def places(self) -> list[list[int]]:
        """Of each text, where in the row its tokens are."""
        starts = [self.shared]
        for end in self._ends:
            starts.append(starts[-1] + len(end))
        return [[*range(self.shared), *range(*between)] for between in pairwise(starts)]

    def joined(self, text: Text) -> Row:
        """With one more text."""
        pairs = zip(self.texts[0][: self.shared], text, strict=False)
        return Row((*self.texts, text), sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))


def rows(texts: Iterable[Text], most: int, alone: float) -> list[Row]:
    """Each text once. A row that several share has at most `most` tokens.

    What a token costs in attention grows with its row, those of other texts among its keys: `alone` is what
    it costs besides, in keys.
    """

    def cost(size: int) -> float:
        return size * (alone + size)

    found: list[Row] = []
    for text in sorted(set(texts)):
        if found:
            joined = found[-1].joined(text)
            added = cost(joined.size) - cost(found[-1].size)
            if joined.size <= most and added <= (1 - SAVED) * cost(len(text)):
                found[-1] = joined
                continue
        found.append(Row((text,), len(text)))
    return found
