"""Which networks there are: the paper's 37 small ones, then its 8 large ones."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import mxnet as mx

from .inception import INCEPTION_21K, INCEPTION_BN, googlenet, inception_bn, inception_v3
from .inception4 import inception_resnet_v2, inception_v4
from .layers import Symbol
from .plain import alexnet, network_in_network, squeezenet, vgg
from .resnet import dual_path, resnet, resnet_v2, resnext, wide_resnet
from .xception import xception

Build = Callable[[int], Symbol]


@dataclass(frozen=True)
class Entry:
    """A network of the paper.

    *build* makes its symbol for a number of classes; *paper_mb* are the MiB of weights that the paper tells of;
    *input_shape* is that of one image, (1, 3, height, width); *note* says what is not told by the name.
    """

    name: str
    build: Build
    paper_mb: float
    input_shape: tuple[int, int, int, int]
    large: bool
    classes: int = 1000
    note: str = ""

    def symbol(self, classes: int | None = None) -> Symbol:
        """From an input ``data`` to probabilities; names are the same each time."""
        with mx.name.NameManager():
            return self.build(self.classes if classes is None else classes)


def _entry(
    name: str,
    build: Build,
    paper_mb: float,
    size: int = 224,
    classes: int = 1000,
    note: str = "",
    *,
    large: bool = False,
) -> Entry:
    return Entry(name, build, paper_mb, (1, 3, size, size), large, classes, note)


_VGG16, _VGG19 = partial(vgg, layers=(2, 2, 3, 3, 3)), partial(vgg, layers=(2, 2, 4, 4, 4))
_CAFFENET = partial(alexnet, groups=2)
_BN = partial(inception_bn, stem=(64, 64, 192), modules=INCEPTION_BN)
_BN_21K = partial(inception_bn, stem=(96, 128, 288), modules=INCEPTION_21K)
_DPN68 = partial(dual_path, stem=(10, 3), inner=128, outer=64, units=(3, 4, 12, 3), growth=(16, 32, 32, 64))
_DPN92 = partial(dual_path, stem=(64, 7), inner=96, outer=256, units=(3, 4, 20, 3), growth=(16, 32, 24, 128))


def _resnet(depth: int) -> Build:
    return partial(resnet, depth=depth)


def _v2(depth: int) -> Build:
    return partial(resnet_v2, depth=depth)


def _resnext(depth: int, *, normalised: bool = False) -> Build:
    return partial(resnext, depth=depth, normalised=normalised)


_ONE_TOWER = "without the groups that two GPUs called for: with them it has 233 MiB"
_MXNETS = "32x4d as well, but with the input normalised, as in MXNet's own"

_SMALL = (
    _entry("alexnet", alexnet, 238, 227, note=_ONE_TOWER),
    _entry("googlenet", googlenet, 27),
    _entry("caffenet", _CAFFENET, 233, 227),
    _entry("rcnn", _CAFFENET, 221, 227, 200, "CaffeNet with the classes of ILSVRC13's detection"),
    _entry("dpn68", _DPN68, 49),
    _entry("dpn92", _DPN92, 145),
    _entry("inception-v3", inception_v3, 92, 299),
    _entry("inception-v4", inception_v4, 164, 299),
    _entry("inceptionbn-v2", _BN_21K, 129, 224, 21841, "MXNet's wider one for all of ImageNet"),
    _entry("inceptionbn-v3", _BN, 44),
    _entry("inception-resnet-v2", inception_resnet_v2, 214, 299),
    _entry(
        "locationnet",
        _v2(101),
        285,
        224,
        15527,
        "ResNet101 over cells of the Earth's surface; as v2, for the paper does not say",
    ),
    _entry("nin", network_in_network, 29, 227),
    _entry("resnet101", _resnet(101), 170),
    _entry("resnet101-v2", _v2(101), 171),
    _entry("resnet152", _resnet(152), 231),
    _entry("resnet152-11k", _v2(152), 311, 224, 11221, "over half of ImageNet's classes, where MXNet's own was v2"),
    _entry("resnet152-v2", _v2(152), 231),
    _entry("resnet18-v2", _v2(18), 45),
    _entry("resnet200-v2", _v2(200), 248),
    _entry("resnet269-v2", _v2(269), 391),
    _entry("resnet34-v2", _v2(34), 84),
    _entry("resnet50", _resnet(50), 98),
    _entry("resnet50-v2", _v2(50), 98),
    _entry("resnext101", _resnext(101, normalised=True), 170, note=_MXNETS),
    _entry("resnext101-32x4d", _resnext(101), 170),
    _entry("resnext26-32x4d", _resnext(26), 59),
    _entry("resnext50", _resnext(50, normalised=True), 96, note=_MXNETS),
    _entry("resnext50-32x4d", _resnext(50), 96),
    _entry("squeezenet-1.0", partial(squeezenet, version="1.0"), 4.8, 227),
    _entry("squeezenet-1.1", partial(squeezenet, version="1.1"), 4.8, 227),
    _entry("vgg16", _VGG16, 528),
    _entry("vgg16-sod", _VGG16, 514, 224, 100, "VGG16 over 100 windows that may hold a salient object"),
    _entry("vgg16-sos", _VGG16, 513, 224, 5, "VGG16 over the numbers of salient objects, 0 to 4 or more"),
    _entry("vgg19", _VGG19, 549),
    _entry("wrn50-2", partial(wide_resnet, depth=50), 264),
    _entry("xception", xception, 88, 299),
)
_LARGE = (
    *[
        _entry(f"alexnet-{size}", alexnet, paper_mb, size, note=_ONE_TOWER, large=True)
        for size, paper_mb in ((227, 238), (454, 770), (681, 1694), (908, 3010))
    ],
    *[
        _entry(f"vgg16-{size}", _VGG16, paper_mb, size, large=True)
        for size, paper_mb in ((224, 528), (448, 1704), (672, 3664), (896, 6408))
    ],
)

MODELS = MappingProxyType({entry.name: entry for entry in (*_SMALL, *_LARGE)})
"""The networks by their names, in the paper's order."""
