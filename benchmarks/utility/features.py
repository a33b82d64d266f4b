"""Hand-crafted image features that look at no data: wavelet scattering, whitened on made-up images.

Scattering of depth 2 at two scales and eight angles (Bruna and Mallat 2013, "Invariant Scattering
Convolution Networks"; Tramer and Boneh 2021, arXiv:2011.11660, train on such features with
differential privacy), then a square root, layer norm and a fixed linear map. The map is the
regularised principal component whitening of the features of images drawn from a seeded generator:
gradient descent with little noise and few steps needs features of like size, and no image of the
data set may say which those are.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

SIDE: Final = 28
ANGLES: Final = 8
MADE_UP: Final = 20_000
WIDTH: Final = 1024
REGULARISER: Final = 3e-5
_CHUNK: Final = 250


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    side = np.arange(size) - size // 2
    y, x = np.meshgrid(side, side, indexing="ij")
    return y, x


def gaussian(size: int, sigma: float) -> Tensor:
    """A low-pass filter (size, size) with sum 1."""
    y, x = _grid(size)
    made = np.exp(-(x**2 + y**2) / (2 * sigma**2))
    return torch.from_numpy(made / made.sum()).float()


def morlet(size: int, scale: int) -> Tensor:
    """Complex wavelets of mean zero at every angle, (2 ANGLES, 1, size, size): all real parts, then
    all imaginary ones. Scale j has bandwidth 0.8 2^j and centre frequency 3 pi / 4 / 2^j."""
    y, x = _grid(size)
    sigma, frequency, slant = 0.8 * 2**scale, 3 * math.pi / 4 / 2**scale, 4 / ANGLES
    made = []
    for index in range(ANGLES):
        angle = (ANGLES / 2 - 1 - index) * math.pi / ANGLES
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        envelope = np.exp(-(along**2 + slant**2 * across**2) / (2 * sigma**2))
        wave = envelope * np.exp(1j * frequency * along)
        wave -= envelope * wave.sum() / envelope.sum()
        made.append(wave * slant / (2 * np.pi * sigma**2))
    both = np.stack([w.real for w in made] + [w.imag for w in made])
    return torch.from_numpy(both).float()[:, None]


class Scattering(nn.Module):
    """(B, 1, 28, 28) in [0, 1] -> (B, 81 * 49): the image, 16 first-order moduli and 64 of second
    order, averaged over Gaussian windows on a 7 by 7 grid."""

    fine: Tensor
    coarse: Tensor
    window: Tensor
    narrow: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fine", morlet(9, 0))
        self.register_buffer("coarse", morlet(13, 1))
        self.register_buffer("window", gaussian(17, 3.2)[None, None])
        self.register_buffer("narrow", gaussian(9, 1.6)[None, None])

    def forward(self, image: Tensor) -> Tensor:
        first = self._modulus(functional.conv2d(image, self.fine, padding=4), 1)
        second = self._modulus(functional.conv2d(image, self.coarse, stride=2, padding=6), 1)
        filters = self.coarse.repeat(ANGLES, 1, 1, 1)
        deep = functional.conv2d(first, filters, stride=2, padding=6, groups=ANGLES)
        parts = [
            self._average(image, self.window, 4),
            self._average(first, self.window, 4),
            self._average(second, self.narrow, 2),
            self._average(self._modulus(deep, ANGLES), self.narrow, 2),
        ]
        return torch.cat(parts, 1).flatten(1)

    @staticmethod
    def _modulus(both: Tensor, groups: int) -> Tensor:
        pairs = both.reshape(-1, groups, 2, ANGLES, *both.shape[2:])
        out: Tensor = pairs.square().sum(2).sqrt().flatten(1, 2)
        return out

    @staticmethod
    def _average(maps: Tensor, window: Tensor, stride: int) -> Tensor:
        channels = maps.shape[1]
        return functional.conv2d(
            maps,
            window.repeat(channels, 1, 1, 1),
            stride=stride,
            padding=window.shape[-1] // 2,
            groups=channels,
        )


class Features(nn.Module):
    """uint8 images (B, 1, 28, 28) -> (B, width), each of norm 1."""

    mean: Tensor
    whitening: Tensor

    def __init__(self, width: int = WIDTH, made_up: int = MADE_UP) -> None:
        super().__init__()
        self.scattering = Scattering()
        mean, whitening = _whitening(self, width, made_up)
        self.register_buffer("mean", mean)
        self.register_buffer("whitening", whitening)

    def raw(self, image: Tensor) -> Tensor:
        found = (self.scattering(image.float() / 255.0).clamp(min=0.0) + 1e-3).sqrt()
        return functional.layer_norm(found, found.shape[1:])

    def forward(self, image: Tensor) -> Tensor:
        white = (self.raw(image) - self.mean) @ self.whitening
        return white / (white.square().sum(1, keepdim=True) + 1e-12).sqrt()


@torch.no_grad()
def _whitening(features: Features, width: int, count: int) -> tuple[Tensor, Tensor]:
    """Mean (D,) and map (D, width) of made-up images: principal directions over the square root of
    their share of the variance plus ``REGULARISER``."""
    images = made_up(count)
    found = torch.cat([features.raw(part) for part in torch.split(images, _CHUNK)])
    mean = found.mean(0)
    found -= mean
    covariance = found.T @ found
    covariance /= covariance.trace()
    values, directions = _leading(covariance, width)
    return mean, directions / (values + REGULARISER).sqrt()


def _leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvalues and eigenvectors (Halko, Martinsson, Tropp 2011, Algorithm 4.4)."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(len(matrix), min(len(matrix), count + 50), generator=generator)
    for _ in range(6):
        basis = torch.linalg.qr(matrix @ basis)[0]
    values, inner = torch.linalg.eigh(basis.T @ matrix @ basis)
    order = values.argsort(descending=True)[:count]
    return values[order].clamp(min=0.0), basis @ inner[:, order]


def _smooth(count: int, power: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise with a spectrum falling as frequency^-power, each (28, 28) of variance 1."""
    side = torch.fft.fftfreq(SIDE, 1 / SIDE)
    radius = (side[:, None] ** 2 + side[None] ** 2).sqrt()
    radius[0, 0] = torch.inf
    noise = torch.fft.fft2(torch.randn(count, SIDE, SIDE, generator=generator))
    made = torch.fft.ifft2(noise * radius**-power).real
    out: Tensor = made / made.flatten(1).std(1)[:, None, None]
    return out


def made_up(count: int, seed: int = 0) -> Tensor:
    """uint8 (count, 1, 28, 28): centred silhouettes, most of them symmetric, filled with smooth
    texture and stripes on black. What is known of the data set in advance goes in here, and no
    more: pictures of single garments."""
    generator = torch.Generator().manual_seed(seed)
    side = torch.linspace(-1, 1, SIDE)
    y, x = side[:, None], side[None]

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    width, height, power = between(0.25, 1.0), between(0.5, 1.1), between(2, 6)
    right, down = between(-0.1, 0.1), between(-0.15, 0.15)
    radius = ((x - right) / width).abs() ** power + ((y - down) / height).abs() ** power
    outline = _smooth(count, 2.0, generator)
    symmetric = between(0, 1) < 0.6
    outline = torch.where(symmetric, (outline + outline.flip(2)) / 1.4, outline)
    inside = 1 - radius.clamp(max=4) + between(0.2, 1.2) * outline
    mask = torch.sigmoid(inside * between(6, 20))
    texture = between(0.2, 1.0) + between(0.02, 0.25) * _smooth(count, 1.3, generator)
    texture = texture + between(0, 0.25) * _smooth(count, 2.5, generator)
    angle = between(0, math.pi)
    waves = torch.sin(
        (x * angle.cos() + y * angle.sin()) * between(5, 30) + between(0, 2 * math.pi)
    )
    striped = (between(0, 1) < 0.4) * between(0, 0.2)
    rim = mask * (1 - mask) * between(-1.2, 1.2)
    made = mask * (texture + striped * waves) + rim
    return (made.clamp(0, 1) * 255).round().to(torch.uint8)[:, None]


class Classifier(nn.Module):
    """A linear head, which starts at zero, on frozen features."""

    def __init__(self, features: nn.Module, width: int, classes: int = 10) -> None:
        super().__init__()
        self.features = features.requires_grad_(False)
        self.head = nn.Linear(width, classes, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(image))
        return out
