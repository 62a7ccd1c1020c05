"""Memory of the SD-VAE's decoder per image, on the simulated GPU; convolutions' workspaces are not counted.

    PYTHONPATH=tests/simcuda SIMCUDA_COMPILED=1 python -m simcuda tests/simcuda/measure_vae.py

Convolutions give shapes only, the rest runs; random weights in Stable Diffusion's shape. Prints a line for each size
and precision.
"""

import torch
from simcuda import device

from mf_dist.runtime.precision import compute_precision
from mf_dist.runtime.torchvision_repair import repair_torchvision
from mf_dist.vae import _InFp32, to_pixels

repair_torchvision()
from diffusers import AutoencoderKL  # noqa: E402


def main() -> None:
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    vae = vae.eval().requires_grad_(False).to("cuda", memory_format=torch.channels_last)
    vae.decoder.conv_out = _InFp32(vae.decoder.conv_out)
    for side, images in ((32, 2), (64, 1)):
        for precision in ("fp32", "bf16"):
            z = torch.randn(images, 4, side, side, device="cuda")
            device.reset_peak()
            before = device.held()
            with torch.no_grad(), compute_precision(precision, torch.device("cuda")):
                to_pixels(vae.decode(z).sample)
            mib = (device.peak() - before) / images / 2**20
            print(f"{side * 8} px {precision}: {mib:.0f} MiB per image, {50 * mib / 1024:.1f} GiB for 50", flush=True)


if __name__ == "__main__":
    main()
