"""Tangent: a straight line through what was measured of late."""

from __future__ import annotations


class Tangent:
    """Cost by depth: means, variance and covariance, of which a tenth is forgotten each time."""

    def __init__(self) -> None:
        self.mean = 0.0
        """0.0: never measured."""
        self._weight = self._depth = 0.0
        """How much was measured, and the mean depth of it."""
        self._depth2 = self._product = 0.0
        """The variance of depth, and its covariance with the cost."""

    def learn(self, depth: float, cost: float) -> None:
        if self._weight > 3:
            cost = min(cost, 4 * self.mean)
        self._weight = 0.9 * self._weight + 1
        share = 1 / self._weight
        off = depth - self._depth
        self._depth += share * off
        self.mean += share * (cost - self.mean)
        self._depth2 += share * (off * (depth - self._depth) - self._depth2)
        self._product += share * (off * (cost - self.mean) - self._product)

    def at(self, depth: float) -> float:
        """A line through noise may point anywhere: it does not fall, nor far below what was measured."""
        slope = max(0.0, self._product / self._depth2) if self._depth2 > 1 else 0.0
        return max(self.mean + slope * (depth - self._depth), self.mean / 4)
