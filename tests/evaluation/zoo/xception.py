"""Xception (Chollet 2016)."""

from .layers import (
    BRANCH_END,
    LINEAR,
    Symbol,
    classified,
    conv,
    conv_norm_relu,
    data,
    global_pool,
    max_pool,
    norm,
    relu,
)


def xception(classes: int) -> Symbol:
    """Residual blocks of separable convolutions."""
    x = conv_norm_relu(conv_norm_relu(data(), 32, 3, 2, 0), 64, 3, 1, 0)
    before = 64
    for channels in (128, 256, 728):
        # The stem has rectified already.
        y = _separable(x if before == 64 else relu(x), before, channels)
        x = _halved(x, _separable(relu(y), channels, channels, BRANCH_END), channels)
        before = channels
    for _ in range(8):
        y = x
        for gain in (1, 1, BRANCH_END):
            y = _separable(relu(y), 728, 728, gain)
        x = x + y
    y = _separable(relu(x), 728, 728)
    x = _halved(x, _separable(relu(y), 728, 1024, BRANCH_END), 1024)
    x = relu(_separable(x, 1024, 1536))
    return classified(global_pool(relu(_separable(x, 1536, 2048))), classes)


def _separable(x: Symbol, before: int, channels: int, gain: float = 1) -> Symbol:
    """Each of the channels that there are *before* by itself, then all of them at each place; normalised."""
    return norm(conv(conv(x, before, 3, groups=before, gain=LINEAR), channels, gain=gain))


def _halved(x: Symbol, y: Symbol, channels: int) -> Symbol:
    return max_pool(y, pad=1) + norm(conv(x, channels, 1, 2))
