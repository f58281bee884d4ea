"""Load a torch file by path as a mapping, and run ResNet-18 on the mapped weights."""

import time

import torch
import torchvision
from common import digest, directory_argument, report_mapped, run, seeded_array


def main() -> None:
    """Load `model.pt`, infer once, and report."""
    path = directory_argument(__doc__) / "model.pt"
    torch.set_num_threads(1)

    start = time.perf_counter()
    weights = torch.load(path, mmap=True, weights_only=True)
    load_s = time.perf_counter() - start
    network = torchvision.models.resnet18(weights=None).eval()
    # Without `assign` the weights would be copied out of the mapping.
    network.load_state_dict(weights, assign=True)
    image = torch.from_numpy(seeded_array((1, 3, 224, 224)))
    start = time.perf_counter()
    with torch.inference_mode():
        output = network(image).numpy()
    results = {
        "load_s": round(load_s, 4),
        "infer_s": round(time.perf_counter() - start, 4),
        "output_sha256": digest([output.data]),
    }
    report_mapped(results, path)


if __name__ == "__main__":
    run(main)
