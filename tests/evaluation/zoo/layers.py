"""Layers that the networks share. Symbols in, symbols out; names are counted by MXNet.

Wherever a kernel's padding is not given, it keeps the size of what it is laid over, apart from the stride.
"""

from typing import Any

import mxnet as mx

Symbol = Any
Kernel = int | tuple[int, int]

BRANCH_END = 0.1
"""Gain of the last convolution of a residual branch: with He's own, what is summed would double with every block."""
CLASSIFIER = 0.25
"""Gain of the last layer of all: with He's own, one class would be almost certain."""
LINEAR = 0.5**0.5
"""Gain of a convolution that no rectifier follows."""


def _pair(size: Kernel) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def data() -> Symbol:
    """The input: images of shape (batch, 3, height, width)."""
    return mx.sym.var("data")


def conv(
    x: Symbol,
    channels: int,
    kernel: Kernel = 1,
    stride: int = 1,
    pad: int | None = None,
    *,
    groups: int = 1,
    bias: bool = False,
    gain: float = 1,
) -> Symbol:
    """A convolution. Its random weights' standard deviation is *gain* times He's."""
    kernel = _pair(kernel)
    return mx.sym.Convolution(
        x,
        num_filter=channels,
        kernel=kernel,
        stride=(stride, stride),
        pad=tuple(size // 2 for size in kernel) if pad is None else (pad, pad),
        num_group=groups,
        no_bias=not bias,
        attr={"__gain__": str(gain)},
    )


def relu(x: Symbol) -> Symbol:
    """The rectifier."""
    return mx.sym.Activation(x, act_type="relu")


def norm(x: Symbol, *, scaled: bool = True) -> Symbol:
    """Batch normalisation, with a learnt scale or with none."""
    return mx.sym.BatchNorm(x, fix_gamma=not scaled, eps=2e-5)


def norm_relu(x: Symbol) -> Symbol:
    """Normalised and rectified."""
    return relu(norm(x))


def conv_relu(x: Symbol, channels: int, kernel: Kernel = 1, stride: int = 1, pad: int | None = None) -> Symbol:
    """A convolution with biases, rectified."""
    return relu(conv(x, channels, kernel, stride, pad, bias=True))


def conv_norm_relu(x: Symbol, channels: int, kernel: Kernel = 1, stride: int = 1, pad: int | None = None) -> Symbol:
    """A convolution, normalised and rectified."""
    return norm_relu(conv(x, channels, kernel, stride, pad))


def max_pool(x: Symbol, kernel: int = 3, stride: int = 2, pad: int = 0, *, up: bool = False) -> Symbol:
    """The largest of each window. With *up*, as Caffe has it, the last window may jut out."""
    return mx.sym.Pooling(
        x, **_pool(kernel, stride, pad), pool_type="max", pooling_convention="full" if up else "valid"
    )


def average_pool(x: Symbol) -> Symbol:
    """The mean of 3x3 around each place."""
    return mx.sym.Pooling(x, **_pool(3, 1, 1), pool_type="avg")


def _pool(kernel: int, stride: int, pad: int) -> dict[str, tuple[int, int]]:
    return {"kernel": (kernel, kernel), "stride": (stride, stride), "pad": (pad, pad)}


def global_pool(x: Symbol) -> Symbol:
    """The mean of each channel."""
    return mx.sym.Pooling(x, global_pool=True, kernel=(1, 1), pool_type="avg")


def response_norm(x: Symbol) -> Symbol:
    """Local response normalisation, with AlexNet's constants."""
    return mx.sym.LRN(x, nsize=5, alpha=1e-4, beta=0.75, knorm=1)


def concat(*parts: Symbol) -> Symbol:
    """Channels one after the other."""
    return mx.sym.concat(*parts, dim=1)


def dropout(x: Symbol, rate: float = 0.5) -> Symbol:
    """Nothing, at inference."""
    return mx.sym.Dropout(x, p=rate)


def dense(x: Symbol, units: int, *, gain: float = 1) -> Symbol:
    """A fully connected layer with biases, over all that an image has. For *gain* see `conv`."""
    return mx.sym.FullyConnected(x, num_hidden=units, attr={"__gain__": str(gain)})


def probabilities(x: Symbol) -> Symbol:
    """Softmax over an image's classes: of shape (batch, classes)."""
    return mx.sym.softmax(mx.sym.flatten(x))


def classified(x: Symbol, classes: int) -> Symbol:
    """Probabilities by a fully connected layer."""
    return probabilities(dense(x, classes, gain=CLASSIFIER))
