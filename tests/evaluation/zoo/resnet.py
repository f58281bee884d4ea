"""Residual networks: ResNet (v1, v2), ResNeXt, WRN, and their cousins DPN."""

from itertools import pairwise

import mxnet as mx

from .layers import (
    BRANCH_END,
    CLASSIFIER,
    Symbol,
    classified,
    concat,
    conv,
    conv_norm_relu,
    data,
    global_pool,
    max_pool,
    norm,
    norm_relu,
    probabilities,
    relu,
)

UNITS = {
    18: (2, 2, 2, 2),
    26: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    269: (3, 30, 48, 8),
}
"""Blocks in each stage, by the number of layers."""
BASIC = (18, 34)
"""Numbers of layers with which a block has two, and no bottleneck."""

Layer = tuple[int, int, int, int]
"""Channels, kernel, stride, groups."""


def resnet(
    classes: int, depth: int, *, widened: int = 1, groups: int = 1, early: bool = True, normalised: bool = False
) -> Symbol:
    """ResNet (He et al. 2015), whose bottlenecks have their stride *early*, in their first layer.

    *widened* twice it is WRN-2 (Zagoruyko and Komodakis 2016), with *groups* too ResNeXt 32x4d (Xie et al. 2016); the
    input may be *normalised*, as in MXNet's own.
    """
    x = _stem(norm(data(), scaled=False) if normalised else data())
    for channels, stride, changed in _blocks(depth):
        x = _block(x, _layers(depth, channels, stride, widened=widened, groups=groups, early=early), changed)
    return classified(global_pool(x), classes)


def resnet_v2(classes: int, depth: int) -> Symbol:
    """ResNet with pre-activation (He et al. 2016). As in MXNet's own, the input is normalised."""
    x = _stem(norm(data(), scaled=False))
    for channels, stride, changed in _blocks(depth):
        x = _preactivated_block(x, _layers(depth, channels, stride), changed)
    return classified(global_pool(norm_relu(x)), classes)


def _stem(x: Symbol) -> Symbol:
    return max_pool(conv_norm_relu(x, 64, 7, 2), pad=1)


def _blocks(depth: int) -> list[tuple[int, int, bool]]:
    """Of each block: how many channels come out, its stride, and whether these change the shape of what came in."""
    basic = depth in BASIC
    return [
        ((64 if basic else 256) << stage, 2 if first and stage > 0 else 1, first and not (basic and stage == 0))
        for stage, count in enumerate(UNITS[depth])
        for first in (True, *[False] * (count - 1))
    ]


def _layers(
    depth: int, channels: int, stride: int, *, widened: int = 1, groups: int = 1, early: bool = False
) -> list[Layer]:
    if depth in BASIC:
        return [(channels, 3, stride, 1), (channels, 3, 1, 1)]
    inner = channels // 4 * widened
    strides = (stride, 1) if early else (1, stride)
    return [(inner, 1, strides[0], 1), (inner, 3, strides[1], groups), (channels, 1, 1, 1)]


def _block(x: Symbol, layers: list[Layer], changed: bool) -> Symbol:
    channels, stride = layers[-1][0], max(layer[2] for layer in layers)
    shortcut = norm(conv(x, channels, 1, stride)) if changed else x
    for width, kernel, step, groups in layers[:-1]:
        x = norm_relu(conv(x, width, kernel, step, groups=groups))
    return relu(norm(conv(x, channels, layers[-1][1], gain=BRANCH_END)) + shortcut)


def _preactivated_block(x: Symbol, layers: list[Layer], changed: bool) -> Symbol:
    channels, stride = layers[-1][0], max(layer[2] for layer in layers)
    shortcut, x = x, norm_relu(x)
    if changed:
        shortcut = conv(x, channels, 1, stride)
    for width, kernel, step, groups in layers[:-1]:
        x = norm_relu(conv(x, width, kernel, step, groups=groups))
    return conv(x, channels, layers[-1][1], gain=BRANCH_END) + shortcut


def dual_path(
    classes: int, *, stem: tuple[int, int], inner: int, outer: int, units: tuple[int, ...], growth: tuple[int, ...]
) -> Symbol:
    """DPN (Chen et al. 2017): channels that are added to, and channels that grow by *growth* a block of each stage.

    *stem* is the first layer's channels and kernel; *inner* and *outer* are the widths of a block in the first stage.
    """
    x = max_pool(conv_norm_relu(data(), *stem, 2), pad=1)
    for stage, (count, grown) in enumerate(zip(units, growth, strict=True)):
        width, channels = inner << stage, outer << stage
        stride = 2 if stage > 0 else 1
        summed, dense = _split(conv(norm_relu(x), channels + 2 * grown, 1, stride), channels)
        for number in range(count):
            y = conv(norm_relu(x), width)
            y = conv(norm_relu(y), width, 3, stride if number == 0 else 1, groups=32)
            more, new = _split(conv(norm_relu(y), channels + grown, gain=BRANCH_END), channels)
            summed, dense = summed + more, concat(dense, new)
            x = concat(summed, dense)
    return probabilities(conv(global_pool(norm_relu(x)), classes, bias=True, gain=CLASSIFIER))


def _split(x: Symbol, at: int) -> tuple[Symbol, Symbol]:
    first, second = (mx.sym.slice_axis(x, axis=1, begin=begin, end=end) for begin, end in pairwise((0, at, None)))
    return first, second
