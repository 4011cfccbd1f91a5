"""The learning rate over a training: it rises linearly over the warm-up, then falls linearly to zero."""


def rate(step: int, steps: int, warmup_fraction: float) -> float:
    """Factor of the learning rate at step 0, 1, ... of `steps`; the warm-up has one step at least."""
    warm = max(1, round(warmup_fraction * steps))
    return min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))
