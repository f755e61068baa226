"""Which way each weight is rounded, so that the layer's output suffers least: GPTQ and AdaRound, in NumPy.

Both minimise the mean square output error sum over rows of (W - Q) H (W - Q)^T, where H is the second moment of the
rows' inputs (`Gram.second`, or the covariance where the bias takes the mean error away).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

BLOCK = 128  # columns that are settled before the others learn of it: one large product instead of many small ones
RATE = 0.05  # of Adam
PENALTY = 1.0  # of a weight between two codes, in units of what rounding at random costs
STRETCH = 0.1  # the sigmoid reaches 0 and 1 for finite arguments: from -0.1 to 1.1
Rounder = Callable[..., np.ndarray]


def gptq(
    weight: np.ndarray,
    second: np.ndarray,
    scale: np.ndarray,
    low: int,
    high: int,
    *,
    act_order: bool = True,
    **_: object,
) -> np.ndarray:
    """GPTQ: rounds one column after the other; those still open take over each one's error as well as they can.

    With U the upper Cholesky factor of H^-1 (of the inputs not yet rounded, in order), rounding column i by the error e
    changes the others by -e / U_ii * U_i, which is optimal brain surgery without computing an inverse per column.
    Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, ICLR 2023.

    Args:
      weight: float [groups, rows, inputs].
      second: float64 [groups, inputs, inputs], positive definite (`Gram.damped`).
      scale: Broadcasts to `weight`; the step of each element.
      low: Smallest code.
      high: Largest code.
      act_order: Take the inputs with the largest second moment first, while there is most room to make good.

    Returns:
      int8 codes, the shape of `weight`.

    >>> h = np.array([[[1.0, 0.9], [0.9, 1.0]]])  # two inputs that are nearly one: errors should cancel
    >>> w = np.array([[[0.4, 0.4]]])
    >>> gptq(w, h, np.ones((1, 1, 1)), -7, 7).tolist(), np.rint(w).astype(int).tolist()
    ([[[0, 1]]], [[[0, 0]]])
    """
    groups, _rows, count = weight.shape
    work = np.array(weight, np.float64)
    step = np.broadcast_to(np.asarray(scale, np.float64), weight.shape)
    diagonal = np.einsum("gkk->gk", second)
    order = np.argsort(-diagonal, axis=-1, kind="stable") if act_order else np.tile(np.arange(count), (groups, 1))
    work = np.take_along_axis(work, order[:, None, :], axis=2)
    step = np.take_along_axis(step, order[:, None, :], axis=2)
    turned = np.take_along_axis(second, order[:, :, None], axis=1)
    turned = np.take_along_axis(turned, order[:, None, :], axis=2)
    # Turned around, the Cholesky factor of H itself is U^-1: its inverse is as exact as the square root of H allows.
    upper = np.linalg.inv(np.linalg.cholesky(turned[:, ::-1, ::-1]))[:, ::-1, ::-1]
    codes = np.empty(weight.shape, np.int8)
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        errors = np.empty((groups, weight.shape[1], stop - start))
        for i in range(start, stop):
            now = np.clip(np.rint(work[:, :, i] / step[:, :, i]), low, high)
            codes[:, :, i] = now
            error = (work[:, :, i] - now * step[:, :, i]) / upper[:, None, i, i]
            work[:, :, i:stop] -= error[:, :, None] * upper[:, None, i, i:stop]
            errors[:, :, i - start] = error
        work[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    back = np.argsort(order, axis=-1)
    return np.take_along_axis(codes, back[:, None, :], axis=2)


def adaround(
    weight: np.ndarray,
    second: np.ndarray,
    scale: np.ndarray,
    low: int,
    high: int,
    *,
    iterations: int = 300,
    **_: object,
) -> np.ndarray:
    """AdaRound: learns for each weight whether it goes up or down, by gradient on a soft rounding that hardens.

    Each weight is floor(w / s) + h(v), h a stretched sigmoid; a penalty 1 - |2h - 1|^beta drives h to 0 or 1 as beta falls
    from 20 to 2. The output error is the exact one over all calibration rows, from their second moment, instead of an
    estimate from a batch; the activation behind the layer is not part of it. At the end single weights are turned the other
    way as long as that helps.
    Nagel, Amjad, van Baalen, Louizos, Blankevoort: Up or Down? Adaptive Rounding, ICML 2020 (equations 21 to 25).

    Args:
      weight: float [groups, rows, inputs].
      second: float64 [groups, inputs, inputs], positive definite.
      scale: Broadcasts to `weight`; the step of each element.
      low: Smallest code.
      high: Largest code.
      iterations: Steps of Adam; the penalty sets in after a fifth of them.

    Returns:
      int8 codes, the shape of `weight`.

    >>> h = np.array([[[1.0, 0.9], [0.9, 1.0]]])
    >>> sorted(adaround(np.array([[[0.4, 0.4]]]), h, np.ones((1, 1, 1)), -7, 7)[0, 0].tolist())
    [0, 1]
    """
    steps = np.asarray(weight, np.float64) / scale
    floor = np.floor(steps)
    rest = (steps - floor).astype(np.float32)
    # In steps, and each row in units of what rounding at random would cost it: one penalty fits all layers.
    size = np.broadcast_to(np.asarray(scale, np.float64), weight.shape)
    noise = np.einsum("gkk,grk->gr", second, np.square(size)) / 12
    unit = np.sqrt(np.maximum(noise, np.finfo(np.float64).tiny) / weight.shape[-1])
    size32, h32 = (size / unit[..., None]).astype(np.float32), second.astype(np.float32)
    limit_low, limit_high = (low - floor).astype(np.float32), (high - floor).astype(np.float32)
    v = -np.log((1 + 2 * STRETCH) / (rest + STRETCH) - 1)
    first, square = np.zeros_like(v), np.zeros_like(v)
    start = iterations // 5
    for number in range(iterations):
        soft = 1 / (1 + np.exp(-v))
        raw = soft * (1 + 2 * STRETCH) - STRETCH
        h = np.clip(raw, 0, 1)
        slope = np.where((raw > 0) & (raw < 1), (1 + 2 * STRETCH) * soft * (1 - soft), 0)
        reached = np.clip(h, limit_low, limit_high)
        gradient = 2 * (((reached - rest) * size32) @ h32) * size32
        gradient *= (h > limit_low) & (h < limit_high)
        if number >= start:
            share = (number - start) / max(1, iterations - start)
            beta = 2 + 9 * (1 + np.cos(np.pi * share))
            side = 2 * h - 1
            gradient -= PENALTY * 2 * beta * np.sign(side) * np.abs(side) ** (beta - 1)
        gradient *= slope
        first += 0.1 * (gradient - first)
        square += 0.001 * (np.square(gradient) - square)
        rate = RATE / (1 - 0.9 ** (number + 1))
        v -= rate * first / (np.sqrt(square / (1 - 0.999 ** (number + 1))) + 1e-8)
    up = 1 / (1 + np.exp(-v)) * (1 + 2 * STRETCH) - STRETCH >= 0.5
    return _settle(
        steps, np.clip(floor + up, low, high), np.clip(floor, low, high), np.clip(floor + 1, low, high), size, second
    )


def _settle(
    steps: np.ndarray, codes: np.ndarray, down: np.ndarray, up: np.ndarray, size: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """Turns single weights the other way, the most useful of each row first, until no turn lowers the output error."""
    error = (steps - codes) * size
    slope = error @ second
    diagonal = np.einsum("gkk->gk", second)[:, None, :]
    group, row = np.indices(codes.shape[:2])
    for _ in range(codes.shape[-1]):
        turn = np.where(codes == down, up, down) - codes
        change = -turn * size
        gain = -(2 * change * slope + np.square(change) * diagonal)
        best = gain.argmax(axis=-1)
        useful = np.take_along_axis(gain, best[..., None], -1)[..., 0] > 1e-9 * np.abs(error * slope).sum(axis=-1)
        if not useful.any():
            break
        moved = np.where(useful, change[group, row, best], 0.0)
        codes[group, row, best] += np.where(useful, turn[group, row, best], 0.0)
        error[group, row, best] += moved
        slope += moved[..., None] * second[group, best]
    return codes.astype(np.int8)


ROUNDERS: Mapping[str, Rounder] = MappingProxyType({"gptq": gptq, "adaround": adaround})
