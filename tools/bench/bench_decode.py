"""Times the VAE's decoder, most of the work of one-step sampling, by precision, memory layout and compilation.

    python tools/bench/bench_decode.py                              # the shape of Stable Diffusion's, random weights
    python tools/bench/bench_decode.py --vae stabilityai/sd-vae-ft-mse --batch 50 --rounds 10

Every form decodes the same latents, interleaved, `--rounds` times after a first call that compiles. Speeds are those
of the best round, since another job may share the machine; "pixels off" are those that differ from the plain fp32
form's. tf32 is measured on a GPU only.
"""

import argparse
import sys
import tempfile
import time

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded

FORMS = {
    "fp32": ("fp32", False, False),
    "fp32, channels last": ("fp32", True, False),
    "fp32, compiled": ("fp32", False, True),
    "fp32, channels last, compiled": ("fp32", True, True),
    "tf32, channels last": ("tf32", True, False),
    "tf32, channels last, compiled": ("tf32", True, True),
    "bf16, channels last": ("bf16", True, False),
    "bf16, channels last, compiled": ("bf16", True, True),
}
"""name -> (precision, channels last, compiled)."""


def random_vae(folder, width):
    """Saves a VAE of Stable Diffusion's shape (at `width` 128) with random weights that keep the signal's scale."""
    from mf_dist.runtime.torchvision_repair import repair_torchvision

    repair_torchvision()
    from diffusers import AutoencoderKL

    widths = [width, 2 * width, 4 * width, 4 * width]
    model = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=256,
        norm_num_groups=min(32, width),
    )
    model.save_pretrained(folder)
    return folder


def variants(source, device, eager):
    import torch

    from mf_dist.vae import Vae

    vaes = {}
    for name, (precision, last, compiled) in FORMS.items():
        if (precision == "tf32" and device.type == "cpu") or (eager and compiled):
            continue
        vae = Vae(source, device, precision=precision, compiled=compiled)
        vae.model.to(memory_format=torch.channels_last if last else torch.contiguous_format)
        vaes[name] = vae
    return vaes


def timed(vae, x, device):
    import torch

    start = time.perf_counter()
    pixels = vae.decode(x)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return pixels, time.perf_counter() - start


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--vae", type=expanded, help="folder or hub id (default: random weights)")
    parser.add_argument("--width", type=int, default=128, help="width of the random VAE's first layer (default 128)")
    parser.add_argument("--latent-size", type=int, default=32, help="side of the latents (default 32)")
    parser.add_argument("--batch", type=int, default=1, help="images decoded together (default 1)")
    parser.add_argument("--rounds", type=int, default=3, help="(default 3)")
    parser.add_argument("--eager", action="store_true", help="leave out the compiled forms")
    args = parser.parse_args()
    if min(args.width, args.latent_size, args.batch, args.rounds) < 1:
        raise UserError("--width, --latent-size, --batch and --rounds must be at least 1")
    import torch

    from mf_dist.runtime.compiler import require_compiler
    from mf_dist.runtime.torchvision_repair import repair_torchvision

    repair_torchvision()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not args.eager:
        require_compiler(device, "give --eager")
    torch.manual_seed(0)
    x = torch.randn(args.batch, 4, args.latent_size, args.latent_size)
    with tempfile.TemporaryDirectory() as folder:
        forms = variants(args.vae or random_vae(folder, args.width), device, args.eager)
    first = {name: timed(vae, x, device) for name, vae in forms.items()}
    times = {name: [] for name in forms}
    for _ in range(args.rounds):
        for name, vae in forms.items():
            times[name].append(timed(vae, x, device)[1])
    plain, base = first["fp32"][0].int(), min(times["fp32"]) / args.batch
    print(f"{'form':32}{'s/image':>9}{'worst':>9}{'speed':>7}{'1st, s':>8}{'pixels off':>12}{'by':>4}")
    for name, seconds in times.items():
        best, worst = min(seconds) / args.batch, max(seconds) / args.batch
        off = (first[name][0].int() - plain).abs()
        print(
            f"{name:32}{best:9.3f}{worst:9.3f}{base / best:7.2f}"
            f"{first[name][1]:8.1f}{(off > 0).float().mean().item():12.2%}{off.max().item():4d}"
        )


if __name__ == "__main__":
    sys.exit(main())
