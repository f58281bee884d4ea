"""What weights take in several processes together, of each family of networks, once they have inferred some times."""

from collections.abc import Sequence
from contextlib import ExitStack

from tests.evaluation.results import Folding, Results
from tests.evaluation.setting import Model, Setting
from tests.frameworks.folders import ask, start, told

FAMILIES = (
    *("alexnet", "googlenet", "dpn68", "inception-v3", "inception-v4", "inceptionbn-v3", "inception-resnet-v2", "nin"),
    *("resnet50", "resnet50-v2", "resnext50-32x4d", "squeezenet-1.1", "vgg16", "wrn50-2", "xception"),
)
"""One network of each."""


def folding(setting: Setting, models: Sequence[Model], results: Results, *, processes: int) -> None:
    """Have processes infer at once, and then sum up what their weights take."""
    for model in (model for model in models if model.name in FAMILIES):
        setting.write(model)
        with setting.mounted() as mount, ExitStack() as stack:
            place, size = mount.path / model.name, model.input_shape[-1]
            running = [start(stack, setting.python, place, shared=True, size=size) for _ in range(processes)]
            reports = [told(process) for process in running]
            taken = [ask(process) for process in running]
        if len({output for each in reports for output in each["outputs"]}) > 1:
            results.failures.append(f"{model.name}: outputs differ between processes that share weights")
        result = Folding(
            model=model.name,
            processes=processes,
            nbytes=model.nbytes,
            own=sum(each["own_kib"] for each in reports) << 10,
            own_folded=sum(each["Anonymous"] for each in taken) << 10,
            all_folded=sum(each["Pss"] for each in taken) << 10,
            before_s=sum(each["before_s"] for each in reports) / processes,
            after_s=sum(each["after_s"] for each in reports) / processes,
        )
        results.foldings.append(result)
        setting.console.print(f"[dim]{model.name}: {result.copies:.2f} copies[/dim]", highlight=False)
