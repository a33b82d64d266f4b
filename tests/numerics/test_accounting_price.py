"""What the filter's validity under adaptive jobs costs in noise, against plain RDP accounting."""

from __future__ import annotations

import pytest

from casemate.accounting import calibrate, rdp
from casemate.spec.job import DpEvent

# (rate, steps, epsilon, delta)
SETTINGS = [
    (0.01, 1000, 1.0, 1e-5), (0.01, 10_000, 2.0, 1e-5), (0.05, 200, 3.0, 1e-4),
    (0.1, 300, 8.0, 1e-5), (0.001, 1000, 0.5, 1e-6), (0.2, 100, 4.0, 1e-4), (1.0, 50, 2.0, 1e-5),
    (0.0005, 300, 1.0, 1e-5), (0.02, 30, 10.0, 1e-3), (0.14, 200, 2.0, 1e-5),
    (0.03, 500, 2.0, 1e-5), (0.02, 2000, 0.3, 1e-6), (0.05, 1000, 8.0, 1e-3),
]  # fmt: skip


def plain_noise(rate: float, steps: int, epsilon: float, delta: float) -> float:
    """The smallest noise by the plain conversion, for a job fixed in advance."""
    low, high = 2.0**-4, 2.0**8
    while high / low > 1 + 1e-4:
        middle = (low * high) ** 0.5
        event = DpEvent(rate=rate, noise_multiplier=middle, steps=steps)
        enough = rdp.epsilon(rdp.curve(event), delta) <= epsilon
        low, high = (low, middle) if enough else (middle, high)
    return high


@pytest.mark.parametrize("setting", SETTINGS)
def test_price_of_adaptivity(setting: tuple[float, int, float, float]) -> None:
    ratio = calibrate.noise_multiplier(*setting) / plain_noise(*setting)
    assert 1.0 < ratio < 1.1
