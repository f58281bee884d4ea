"""diffusers: a pipeline of a U-Net and a scheduler."""

from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from tests.engines.programs.common import floats, main


def build(directory: Path, divide: int) -> None:
    """Random weights."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256),
        layers_per_block=2 if divide == 1 else 1,
        norm_num_groups=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100)).save_pretrained(directory)


def load(directory: Path) -> tuple[object, bytes]:
    """The pipeline, and one step of it."""
    pipeline = DDPMPipeline.from_pretrained(directory)
    with torch.no_grad():
        noise = pipeline.unet(torch.ones(1, 3, 32, 32), 10).sample
    return pipeline, floats(noise.flatten()[:64].tolist())


if __name__ == "__main__":
    main(build, {"pipeline": ("*/*", load)})
