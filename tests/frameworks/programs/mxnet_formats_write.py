"""Write ``.params`` files by MXNet, and report what is in them."""

import argparse
import zlib
from pathlib import Path
from typing import Any

import mxnet as mx
from common import report, run, seeded_array

DTYPES = ("float32", "float64", "float16", "uint8", "int32", "int8", "int64")


def facts_of(arrays: dict[str, Any]) -> dict[str, list[Any]]:
    """What a table is to tell of arrays: dtype, shape and CRC of the bytes."""
    found = {}
    for name, array in arrays.items():
        value = array.asnumpy()
        found[name] = [str(value.dtype), list(value.shape), zlib.crc32(value.tobytes())]
    return found


def main() -> None:
    """Write all in the directory named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    named = {f"arg:as.{dtype}": mx.nd.array(seeded_array((5, 7)) * 10, dtype=dtype) for dtype in DTYPES}
    named["aux:small"] = mx.nd.array([1.5])
    mx.nd.save(str(directory / "named.params"), named)
    listed = list(named.values())
    mx.nd.save(str(directory / "listed.params"), listed)
    network = mx.gluon.nn.Dense(3, in_units=4)
    network.initialize()
    network.save_parameters(str(directory / "gluon.params"))
    parameters = {name: value.data() for name, value in network._collect_params_with_prefix().items()}
    with mx.util.np_shape(True), mx.util.np_array(True):
        scalar = mx.np.array(2.5)
        mx.npx.save(str(directory / "scalar.params"), {"scalar": scalar})
    report(
        {
            "files": {
                "named.params": facts_of(named),
                "listed.params": facts_of({str(number): array for number, array in enumerate(listed)}),
                "gluon.params": facts_of(parameters),
                "scalar.params": facts_of({"scalar": scalar}),
            }
        }
    )


if __name__ == "__main__":
    run(main)
