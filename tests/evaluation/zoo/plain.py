"""Networks of one path: AlexNet and CaffeNet, VGG, Network in Network, SqueezeNet."""

from .layers import (
    CLASSIFIER,
    Symbol,
    classified,
    concat,
    conv,
    conv_relu,
    data,
    dense,
    dropout,
    global_pool,
    max_pool,
    probabilities,
    relu,
    response_norm,
)


def alexnet(classes: int, *, groups: int = 1) -> Symbol:
    """AlexNet (Krizhevsky et al. 2012); as CaffeNet, which pools before it normalises, with two *groups*."""
    caffe = groups > 1

    def reduced(x: Symbol) -> Symbol:
        return response_norm(max_pool(x)) if caffe else max_pool(response_norm(x))

    x = reduced(conv_relu(data(), 96, 11, 4, 0))
    x = reduced(relu(conv(x, 256, 5, groups=groups, bias=True)))
    x = conv_relu(x, 384, 3)
    x = relu(conv(x, 384, 3, groups=groups, bias=True))
    x = max_pool(relu(conv(x, 256, 3, groups=groups, bias=True)))
    return _three_dense(x, classes)


def vgg(classes: int, layers: tuple[int, ...]) -> Symbol:
    """VGG (Simonyan and Zisserman 2014) with that many convolutions in each of its five stages."""
    x = data()
    for channels, count in zip((64, 128, 256, 512, 512), layers, strict=True):
        for _ in range(count):
            x = conv_relu(x, channels, 3)
        x = max_pool(x, 2)
    return _three_dense(x, classes)


def _three_dense(x: Symbol, classes: int) -> Symbol:
    for _ in range(2):
        x = dropout(relu(dense(x, 4096)))
    return classified(x, classes)


def network_in_network(classes: int) -> Symbol:
    """Network in Network (Lin et al. 2013), as its authors published it for ImageNet."""
    x = data()
    for channels, kernel, stride, pad in ((96, 11, 4, 0), (256, 5, 1, 2), (384, 3, 1, 1)):
        x = conv_relu(x, channels, kernel, stride, pad)
        x = max_pool(conv_relu(conv_relu(x, channels), channels), up=True)
    x = conv_relu(conv_relu(dropout(x), 1024, 3), 1024)
    return _classified_by_place(x, classes)


def _classified_by_place(x: Symbol, classes: int) -> Symbol:
    return probabilities(global_pool(relu(conv(x, classes, bias=True, gain=CLASSIFIER))))


def squeezenet(classes: int, version: str) -> Symbol:
    """SqueezeNet (Iandola et al. 2016): 1.0, or 1.1, which pools earlier and begins with less."""
    x = conv_relu(data(), 96, 7, 2, 0) if version == "1.0" else conv_relu(data(), 64, 3, 2, 0)
    pooled_before = {"1.0": (0, 3, 7), "1.1": (0, 2, 4)}[version]
    for number, squeezed in enumerate((16, 16, 32, 32, 48, 48, 64, 64)):
        x = _fire(max_pool(x, up=True) if number in pooled_before else x, squeezed)
    return _classified_by_place(dropout(x), classes)


def _fire(x: Symbol, squeezed: int) -> Symbol:
    x = conv_relu(x, squeezed)
    return concat(conv_relu(x, 4 * squeezed), conv_relu(x, 4 * squeezed, 3))
