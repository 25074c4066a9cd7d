"""Whether weights stay as the steps left them: what others did to them between two steps, against what steps had done.

An average put in the place of the weights, a reload or a swap takes back most of the way that the steps have gone since
somebody last wrote to the weights; a constraint, a projection or noise goes another way.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from grit_impl.ledger.fingerprints import Look


class KeptWatch:
    """Compares weights with what the step before left, and with where its steps began.

    Args:
        n: Watched tensors.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._anchor: Look | None = None
        self._compared: weakref.ref[Look] | None = None

    @torch.no_grad()
    def look(self, now: Look, left: Look | None) -> Tensor | None:
        """Two numbers per tensor, (N, 2); NaN where nobody has written to it.

        The share of the way that is still there: 1 - <b, d> / |d|^2, and the cosine of b and d, where b = left - now is
        what was taken back, and d = left - anchor the way of the steps since somebody wrote last.

        Args:
            now: The weights.
            left: As the step before left them; None: there was none.
        """
        anchor = self._anchor
        if anchor is None or left is None:
            self._anchor = now
            return None
        if self._compared is not None and left is self._compared():  # a step of a class inside the step of a subclass
            return None
        self._compared = weakref.ref(left)
        out, stacks = torch.full((self._n, 2), torch.nan, dtype=torch.float64), dict(anchor.stacks)
        for key, (members, values) in now.stacks.items():
            before, begin = left.values(key, members), anchor.values(key, members)
            back, way = before - values, before - begin
            cross, length = (back * way).sum(1), torch.linalg.vector_norm(way, dim=1)
            size = torch.linalg.vector_norm(back, dim=1)
            out = out.to(key[2])
            told = torch.stack([1 - cross / length.square(), cross / (size * length)], 1).double()
            out[list(members)] = told.masked_fill((size == 0)[:, None], torch.nan)
            stacks[key] = members, torch.where((size != 0)[:, None], values, begin)
        self._anchor = Look(None, stacks)
        return out
