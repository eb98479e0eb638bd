"""How a sum is cut into parts."""

from __future__ import annotations

import itertools

from qloralab.kernels.gpu.split import FEWEST_STEPS, FEWEST_STEPS_OF_FEW_TOKENS, PROGRAMS, steps_of


def test_splits_fill_the_gpu_and_leave_no_program_without_work():
    assert steps_of(PROGRAMS, 64) == 64  # enough programs: not split
    assert steps_of(32, 64) == FEWEST_STEPS  # 4096 x 4096: 8 splits
    assert steps_of(1, 4) == 4  # too short
    assert steps_of(32, 64, tokens=16) == FEWEST_STEPS_OF_FEW_TOKENS  # 16 splits
    assert steps_of(112, 64, tokens=32) == -(-64 // 7)  # 14336 x 4096: 784 programs
    for programs, tiles, splits in itertools.product((1, 7, 100), (1, 9, 64, 171), (None, 1, 2, 5, 1000)):
        steps = steps_of(programs, tiles, splits)
        assert 1 <= steps <= tiles
        assert (-(-tiles // steps) - 1) * steps < tiles
