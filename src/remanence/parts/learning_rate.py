"""The learning rate of a step as a pure function of the step, so that a resumed run needs no scheduler state."""

import math


def warm_cosine(step: int, n_steps: int, warm_share: float = 0.0) -> float:
    """Share of the peak rate: linear warm-up, then half a cosine down to zero at `n_steps`.

    Args:
        step: steps done so far, 0 <= step < n_steps.
        warm_share: part of the steps that warm up, in [0, 1).

    Source: Loshchilov and Hutter 2017, SGDR (arXiv 1608.03983, eq. 5), one period.

    Example:
        >>> warm_cosine(0, 10), round(warm_cosine(5, 10), 2), warm_cosine(0, 10, warm_share=0.2)
        (1.0, 0.5, 0.5)
    """
    warm = round(n_steps * warm_share)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, n_steps - warm)))
