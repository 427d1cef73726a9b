"""TemperatureTable: factors on queries by position, the same bits everywhere.

Legend: P positions.
"""

from __future__ import annotations

import numpy as np

from elinvar.base.config import TemperatureConfig
from elinvar.nn.rope import ln
from elinvar.ops.api import F32

_FIRST_POSITIONS = 512


class TemperatureTable:
    """The table of one TemperatureConfig, grown by doubling as positions are asked for."""

    def __init__(self, config: TemperatureConfig) -> None:
        self._config = config
        self._factors_P = np.empty(0, np.float32)

    def upto(self, num_positions: int) -> F32:
        """f32 [P], P >= num_positions. Factors never change when the table grows."""
        have, c = len(self._factors_P), self._config
        if num_positions > have:
            want = max(_FIRST_POSITIONS, 2 * have, num_positions)
            steps_P = (np.arange(want) + c.offset) // c.length
            factors = [1 + c.scale * ln(1 + step) for step in range(int(steps_P[-1]) + 1)]
            self._factors_P = np.array(factors, np.float32)[steps_P]
        return self._factors_P
