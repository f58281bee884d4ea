"""Inception-v4 and Inception-ResNet-v2 (Szegedy et al. 2016). Their 3x3 of stride 2 have no padding."""

from .layers import (
    Kernel,
    Symbol,
    average_pool,
    classified,
    concat,
    conv,
    conv_norm_relu,
    data,
    dropout,
    global_pool,
    max_pool,
    relu,
)


def _path(x: Symbol, *layers: tuple[int, Kernel]) -> Symbol:
    """Convolutions of those channels and kernels."""
    for channels, kernel in layers:
        x = conv_norm_relu(x, channels, kernel)
    return x


def _halved(x: Symbol, channels: int) -> Symbol:
    return conv_norm_relu(x, channels, 3, 2, 0)


def _begin() -> Symbol:
    x = conv_norm_relu(_halved(data(), 32), 32, 3, 1, 0)
    return conv_norm_relu(x, 64, 3)


def _finish(x: Symbol, classes: int) -> Symbol:
    return classified(dropout(global_pool(x), 0.2), classes)


def inception_v4(classes: int) -> Symbol:
    """Inception-v4."""
    x = _begin()
    x = concat(max_pool(x), _halved(x, 96))
    left, right = _path(x, (64, 1)), _path(x, (64, 1), (64, (1, 7)), (64, (7, 1)))
    x = concat(conv_norm_relu(left, 96, 3, 1, 0), conv_norm_relu(right, 96, 3, 1, 0))
    x = concat(_halved(x, 192), max_pool(x))
    for _ in range(4):
        x = concat(
            _path(average_pool(x), (96, 1)),
            _path(x, (96, 1)),
            _path(x, (64, 1), (96, 3)),
            _path(x, (64, 1), (96, 3), (96, 3)),
        )
    x = concat(max_pool(x), _halved(x, 384), _halved(_path(x, (192, 1), (224, 3)), 256))
    for _ in range(7):
        x = concat(
            _path(average_pool(x), (128, 1)),
            _path(x, (384, 1)),
            _path(x, (192, 1), (224, (1, 7)), (256, (7, 1))),
            _path(x, (192, 1), (192, (1, 7)), (224, (7, 1)), (224, (1, 7)), (256, (7, 1))),
        )
    right = _path(x, (256, 1), (256, (1, 7)), (320, (7, 1)))
    x = concat(max_pool(x), _halved(_path(x, (192, 1)), 192), _halved(right, 320))
    for _ in range(3):
        left, right = _path(x, (384, 1)), _path(x, (384, 1), (448, (1, 3)), (512, (3, 1)))
        x = concat(_path(average_pool(x), (256, 1)), _path(x, (256, 1)), _split(left), _split(right))
    return _finish(x, classes)


def _split(x: Symbol) -> Symbol:
    return concat(_path(x, (256, (1, 3))), _path(x, (256, (3, 1))))


def inception_resnet_v2(classes: int) -> Symbol:
    """Inception-ResNet-v2, with the widths and numbers of blocks of the network that its authors released."""
    x = max_pool(_begin())
    x = max_pool(conv_norm_relu(_path(x, (80, 1)), 192, 3, 1, 0))
    x = concat(
        _path(x, (96, 1)),
        _path(x, (48, 1), (64, 5)),
        _path(x, (64, 1), (96, 3), (96, 3)),
        _path(average_pool(x), (64, 1)),
    )
    for _ in range(10):
        x = relu(
            _added(x, 320, 0.17, _path(x, (32, 1)), _path(x, (32, 1), (32, 3)), _path(x, (32, 1), (48, 3), (64, 3)))
        )
    x = concat(_halved(x, 384), _halved(_path(x, (256, 1), (256, 3)), 384), max_pool(x))
    for _ in range(20):
        x = relu(_added(x, 1088, 0.1, _path(x, (192, 1)), _path(x, (128, 1), (160, (1, 7)), (192, (7, 1)))))
    y = _path(x, (256, 1))
    x = concat(
        _halved(y, 384), _halved(_path(x, (256, 1)), 288), _halved(_path(x, (256, 1), (288, 3)), 320), max_pool(x)
    )
    for _ in range(9):
        x = relu(_eighth(x, 0.2))
    return _finish(_path(_eighth(x, 1), (1536, 1)), classes)


def _eighth(x: Symbol, share: float) -> Symbol:
    return _added(x, 2080, share, _path(x, (192, 1)), _path(x, (192, 1), (224, (1, 3)), (256, (3, 1))))


def _added(x: Symbol, channels: int, share: float, *paths: Symbol) -> Symbol:
    """A *share* of what the paths make, added to what there was."""
    return x + share * conv(concat(*paths), channels, bias=True)
