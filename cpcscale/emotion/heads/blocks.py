"""Vectors made of blocks, such as one of an encoder and one of classic features, in which each block weighs the same.

U utterances, F features of a block, K of its principal components. Pure and deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cpcscale.emotion.encoders.arrays import below

# Standardised features are clipped to +-REACH: one outlier (eGeMAPS has some at 20 deviations) would put its utterance
# far from all others, where a radial kernel predicts the mean.
REACH = 3.0
# The numbers of principal components that a search has.
COMPONENTS = (32, 64)
# A component is divided by the root of its variance and this share of the mean variance, so that noise stays small.
_FLOOR = 0.01


@dataclass(frozen=True)
class Block:
    """`width` features of a vector that lie side by side; the first `reduced` of them become principal components.

    `whole`: all of them also stay as they are, and weigh as much as what they become.
    """

    width: int
    reduced: int = 0
    whole: bool = False


@dataclass(frozen=True)
class ScaledBlock:
    """What the features of a block are standardised by, and the whitened principal axes of the first of them.

    `whole` is that of the block, as 0 or 1.
    """

    mean_F: np.ndarray
    deviation_F: np.ndarray
    centre_R: np.ndarray
    axes_RK: np.ndarray
    whole: np.ndarray = field(default_factory=lambda: np.zeros(()))

    @classmethod
    def of(cls, x_UF: np.ndarray, block: Block, components: int) -> ScaledBlock:
        """That of these training rows, with at most so many components, and at least one."""
        reduced, mean_F, deviation_F = block.reduced, x_UF.mean(axis=0), x_UF.std(axis=0)
        # The mean of equal values may be rounded.
        deviation_F = np.where(deviation_F > 1e-9 * np.abs(mean_F), deviation_F, 1.0)
        x_UR = standardised(x_UF, mean_F, deviation_F)[:, :reduced]
        if not reduced:
            return cls(mean_F, deviation_F, np.zeros(0), np.zeros((0, 0)))
        centre_R = x_UR.mean(axis=0)
        _, size_K, axes_KR = np.linalg.svd(x_UR - centre_R, full_matrices=False)
        variance_K = size_K**2 / len(x_UF)
        floor = _FLOOR * variance_K.sum() / reduced
        # Axes below the floor, such as those that rows of few speakers do not span, would be noise in other rows.
        kept = max(1, min(components, int((variance_K > floor).sum())))
        spread_K = np.sqrt(variance_K + floor)[:kept]
        # All features may be constant.
        axes_RK = axes_KR[:kept].T / np.where(spread_K > 0, spread_K, 1.0)
        return cls(mean_F, deviation_F, centre_R, axes_RK, np.array(float(block.whole)))

    def __call__(self, x_UF: np.ndarray) -> np.ndarray:
        """The block, each feature within +-REACH, by the root of their number: a product of two is a mean over them."""
        x_UF = standardised(x_UF, self.mean_F, self.deviation_F)
        if reduced := len(self.centre_R):
            x_UK = np.clip((x_UF[:, :reduced] - self.centre_R) @ self.axes_RK, -REACH, REACH)
            made_UF = _weighed(np.concatenate([x_UK, x_UF[:, reduced:]], axis=1))
            return np.concatenate([_weighed(x_UF), made_UF], axis=1) / np.sqrt(2) if self.whole else made_UF
        return _weighed(x_UF)


@dataclass(frozen=True)
class BlockScale:
    """Makes of vectors what a machine takes, so that |x - y|^2 is the mean over blocks of |x_b - y_b|^2 / F_b.

    The width of a block then decides nothing. Without blocks, vectors stay as they are.
    """

    blocks: tuple[ScaledBlock, ...] = ()

    @classmethod
    def of(cls, x_UF: np.ndarray, blocks: Sequence[Block], components: int) -> BlockScale:
        """That of these training rows. Raises ValueError for features that are not finite."""
        if blocks and not np.isfinite(x_UF).all():
            raise ValueError("features are not finite")
        widths = [block.width for block in blocks]
        parts = _parts(x_UF.astype(np.float64), widths)
        pairs = zip(parts, blocks, strict=True)
        return cls(tuple(ScaledBlock.of(part_UF, block, components) for part_UF, block in pairs))

    def __call__(self, x_UF: np.ndarray) -> np.ndarray:
        if not self.blocks:
            return x_UF
        parts = _parts(x_UF, [len(block.mean_F) for block in self.blocks])
        scaled = [block(part_UF) for block, part_UF in zip(self.blocks, parts, strict=True)]
        return np.concatenate(scaled, axis=1) / np.sqrt(len(scaled))

    def features(self, x_UF: np.ndarray) -> int:
        """By how many features a machine is to divide |x - y|^2: those of the vectors, or 1 where this does it."""
        return 1 if self.blocks else x_UF.shape[1]

    def arrays(self) -> dict[str, np.ndarray]:
        """All that it is made again from by `scale_from`."""
        return {f"{n}.{name}": value for n, block in enumerate(self.blocks) for name, value in vars(block).items()}


# That of vectors which the machine behind it standardises.
UNSCALED = BlockScale()


def scale_from(arrays: Mapping[str, np.ndarray]) -> BlockScale:
    """That of its arrays. Raises TypeError where they are not those of one."""
    numbers = sorted({int(name.partition(".")[0]) for name in arrays})
    return BlockScale(tuple(ScaledBlock(**below(arrays, f"{number}.")) for number in numbers))


def standardised(x_UF: np.ndarray, mean_F: np.ndarray, deviation_F: np.ndarray) -> np.ndarray:
    """What a fitted scaler with these values makes of vectors; float64."""
    return np.clip((x_UF - mean_F) / deviation_F, -REACH, REACH).astype(np.float64)


def _weighed(x_UF: np.ndarray) -> np.ndarray:
    return x_UF / np.sqrt(x_UF.shape[1])


def _parts(x_UF: np.ndarray, widths: Sequence[int]) -> list[np.ndarray]:
    if not widths:
        return []
    if sum(widths) != x_UF.shape[1]:
        raise ValueError(f"blocks of {list(widths)} features do not fit vectors of {x_UF.shape[1]}")
    return np.split(x_UF, np.cumsum(widths)[:-1], axis=1)
