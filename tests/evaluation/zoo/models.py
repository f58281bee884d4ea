"""Which networks there are: the paper's 37 small ones, then its 8 large ones."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mxnet as mx

from .inception import INCEPTION_21K, INCEPTION_BN, googlenet, inception_bn, inception_v3
from .inception4 import inception_resnet_v2, inception_v4
from .layers import Symbol
from .plain import alexnet, network_in_network, squeezenet, vgg
from .resnet import dual_path, resnet, resnet_v2
from .xception import xception

Build = Callable[[int], Symbol]


@dataclass(frozen=True)
class Entry:
    """A network of the paper.

    *build* makes its symbol for a number of classes; *paper_mb* are the MiB of weights that the paper tells of; *size*
    is an image's height and width; *note* says what is not told by the name.
    """

    name: str
    build: Build
    paper_mb: float
    size: int = 224
    classes: int = 1000
    note: str = ""
    large: bool = False

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """That of one image, (1, 3, height, width)."""
        return 1, 3, self.size, self.size

    def symbol(self) -> Symbol:
        """From an input ``data`` to probabilities; names are the same each time."""
        with mx.name.NameManager():
            return self.build(self.classes)


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
    return partial(resnet, depth=depth, widened=2, groups=32, early=False, normalised=normalised)


_ONE_TOWER = "without the groups that two GPUs called for: with them it has 233 MiB"
_MXNETS = "32x4d as well, but with the input normalised, as in MXNet's own"

_SMALL = (
    Entry("alexnet", alexnet, 238, 227, note=_ONE_TOWER),
    Entry("googlenet", googlenet, 27),
    Entry("caffenet", _CAFFENET, 233, 227),
    Entry("rcnn", _CAFFENET, 221, 227, 200, "CaffeNet with the classes of ILSVRC13's detection"),
    Entry("dpn68", _DPN68, 49),
    Entry("dpn92", _DPN92, 145),
    Entry("inception-v3", inception_v3, 92, 299),
    Entry("inception-v4", inception_v4, 164, 299),
    Entry("inceptionbn-v2", _BN_21K, 129, 224, 21841, "MXNet's wider one for all of ImageNet"),
    Entry("inceptionbn-v3", _BN, 44),
    Entry("inception-resnet-v2", inception_resnet_v2, 214, 299),
    Entry(
        "locationnet",
        _v2(101),
        285,
        224,
        15527,
        "ResNet101 over cells of the Earth's surface; as v2, for the paper does not say",
    ),
    Entry("nin", network_in_network, 29, 227),
    Entry("resnet101", _resnet(101), 170),
    Entry("resnet101-v2", _v2(101), 171),
    Entry("resnet152", _resnet(152), 231),
    Entry("resnet152-11k", _v2(152), 311, 224, 11221, "over half of ImageNet's classes, where MXNet's own was v2"),
    Entry("resnet152-v2", _v2(152), 231),
    Entry("resnet18-v2", _v2(18), 45),
    Entry("resnet200-v2", _v2(200), 248),
    Entry("resnet269-v2", _v2(269), 391),
    Entry("resnet34-v2", _v2(34), 84),
    Entry("resnet50", _resnet(50), 98),
    Entry("resnet50-v2", _v2(50), 98),
    Entry("resnext101", _resnext(101, normalised=True), 170, note=_MXNETS),
    Entry("resnext101-32x4d", _resnext(101), 170),
    Entry("resnext26-32x4d", _resnext(26), 59),
    Entry("resnext50", _resnext(50, normalised=True), 96, note=_MXNETS),
    Entry("resnext50-32x4d", _resnext(50), 96),
    Entry("squeezenet-1.0", partial(squeezenet, version="1.0"), 4.8, 227),
    Entry("squeezenet-1.1", partial(squeezenet, version="1.1"), 4.8, 227),
    Entry("vgg16", _VGG16, 528),
    Entry("vgg16-sod", _VGG16, 514, 224, 100, "VGG16 over 100 windows that may hold a salient object"),
    Entry("vgg16-sos", _VGG16, 513, 224, 5, "VGG16 over the numbers of salient objects, 0 to 4 or more"),
    Entry("vgg19", _VGG19, 549),
    Entry("wrn50-2", partial(resnet, depth=50, widened=2, early=False), 264),
    Entry("xception", xception, 88, 299),
)
_LARGE = (
    *[
        Entry(f"alexnet-{size}", alexnet, paper_mb, size, note=_ONE_TOWER, large=True)
        for size, paper_mb in ((227, 238), (454, 770), (681, 1694), (908, 3010))
    ],
    *[
        Entry(f"vgg16-{size}", _VGG16, paper_mb, size, large=True)
        for size, paper_mb in ((224, 528), (448, 1704), (672, 3664), (896, 6408))
    ],
)

MODELS = {entry.name: entry for entry in (*_SMALL, *_LARGE)}
"""The networks by their names, in the paper's order."""
