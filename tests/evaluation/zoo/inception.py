"""Networks of parallel paths: GoogLeNet, Inception-BN, Inception-v3."""

import mxnet as mx

from .layers import (
    Symbol,
    average_pool,
    classified,
    concat,
    conv_norm_relu,
    conv_relu,
    data,
    dropout,
    global_pool,
    max_pool,
    probabilities,
    response_norm,
)

Widths = tuple[int, ...]

_GOOGLENET: tuple[tuple[Widths, ...], ...] = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)
"""Of each module: 1x1; 3x3 and what reduces before it; 5x5 likewise; behind pooling."""


def googlenet(classes: int) -> Symbol:
    """GoogLeNet (Szegedy et al. 2014), without the classifiers that only training has."""
    x = response_norm(max_pool(conv_relu(data(), 64, 7, 2), up=True))
    x = response_norm(conv_relu(conv_relu(x, 64), 192, 3))
    for stage in _GOOGLENET:
        x = max_pool(x, up=True)
        for one, before_three, three, before_five, five, pooled in stage:
            x = concat(
                conv_relu(x, one),
                conv_relu(conv_relu(x, before_three), three, 3),
                conv_relu(conv_relu(x, before_five), five, 5),
                conv_relu(max_pool(x, stride=1, pad=1), pooled),
            )
    return classified(dropout(global_pool(x), 0.4), classes)


_FROM_4A: tuple[Widths, ...] = (
    (224, 64, 96, 96, 128, 128),
    (192, 96, 128, 96, 128, 128),
    (160, 128, 160, 128, 160, 128),
)
_FROM_4E: tuple[Widths, ...] = ((128, 192, 192, 256), (352, 192, 320, 160, 224, 128), (352, 192, 320, 192, 224, 128))
INCEPTION_BN: tuple[Widths, ...] = (
    (64, 64, 64, 64, 96, 32),
    (64, 64, 96, 64, 96, 64),
    (128, 160, 64, 96),
    *_FROM_4A,
    (96, 128, 192, 160, 192, 128),
    *_FROM_4E,
)
"""Of each module: 1x1; 3x3 and what reduces before it; two 3x3 likewise; behind pooling.

One of four numbers halves the image: it has no 1x1, and nothing behind its pooling.
"""
INCEPTION_21K: tuple[Widths, ...] = (
    (96, 96, 96, 96, 144, 48),
    (96, 96, 144, 96, 144, 96),
    (192, 240, 96, 144),
    *_FROM_4A,
    (96, 128, 192, 160, 96, 128),
    *_FROM_4E,
)
"""The wider one that MXNet published for all of ImageNet's 21,841 classes."""


def inception_bn(classes: int, stem: Widths, modules: tuple[Widths, ...]) -> Symbol:
    """Inception with batch normalisation (Ioffe and Szegedy 2015), with the channels of its *stem* and *modules*."""
    x = max_pool(conv_norm_relu(data(), stem[0], 7, 2), up=True)
    x = max_pool(conv_norm_relu(conv_norm_relu(x, stem[1]), stem[2], 3), up=True)
    for widths in modules:
        # Only the very last module takes the largest where the others average.
        x = _halving(x, *widths) if len(widths) == 4 else _bn_module(x, *widths, largest=widths is modules[-1])
    return classified(global_pool(x), classes)


def _bn_module(
    x: Symbol, one: int, before_three: int, three: int, before_two: int, two: int, pooled: int, *, largest: bool
) -> Symbol:
    pool = max_pool(x, stride=1, pad=1) if largest else average_pool(x)
    return concat(
        conv_norm_relu(x, one),
        conv_norm_relu(conv_norm_relu(x, before_three), three, 3),
        conv_norm_relu(conv_norm_relu(conv_norm_relu(x, before_two), two, 3), two, 3),
        conv_norm_relu(pool, pooled),
    )


def _halving(x: Symbol, before_three: int, three: int, before_two: int, two: int) -> Symbol:
    return concat(
        conv_norm_relu(conv_norm_relu(x, before_three), three, 3, 2),
        conv_norm_relu(conv_norm_relu(conv_norm_relu(x, before_two), two, 3), two, 3, 2),
        max_pool(x, up=True),
    )


def inception_v3(classes: int) -> Symbol:
    """Inception-v3 (Szegedy et al. 2015), from MXNet's own model zoo."""
    network = mx.gluon.model_zoo.vision.Inception3(classes=classes, prefix="inception3_")
    return probabilities(network(data()))
