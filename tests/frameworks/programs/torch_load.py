"""Load a torch file by path as a mapping, and run ResNet-18 on the mapped weights."""

import time

import torch
import torchvision
from common import arguments_with_hold, digest, report_mapped, run, seeded_array


def main() -> None:
    """Load `model.pt`, digest its tensors, infer once, and report."""
    arguments = arguments_with_hold(__doc__)
    path = arguments.directory / "model.pt"
    torch.set_num_threads(1)

    start = time.perf_counter()
    weights = torch.load(path, mmap=True, weights_only=True)
    load_s = time.perf_counter() - start
    tensors_sha256 = digest(weights[key].numpy().data for key in sorted(weights))

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
        "tensors": len(weights),
        "tensors_sha256": tensors_sha256,
        "output_sha256": digest([output.data]),
    }
    report_mapped(results, path, hold=arguments.hold_on_stdin)


if __name__ == "__main__":
    run(main)
