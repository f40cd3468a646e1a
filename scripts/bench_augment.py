"""Images per second of `fedlabel.data.augment.strong` against torchvision's transforms, image by image.

Usage: python scripts/bench_augment.py

The two are timed in turn, in one process, with one CPU thread. "loop" is RandAugment, RandomCrop with reflect padding
and RandomHorizontalFlip from torchvision.transforms.v2 on each image of a batch, stacked at the end. With a GPU the
batched form runs there too; the loop stays on the CPU, as in a data loader, and its time includes the copy to the GPU.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torchvision.transforms import v2

from fedlabel.data.augment import AugmentConfig, strong
from fedlabel.seeding import Draws

REPEATS = 15
SECONDS_PER_REPEAT = 0.1


def seconds_per_call(function: Callable[[], object], device: torch.device) -> float:
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS_PER_REPEAT:
        function()
        calls += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


def compare(batch: int, channels: int, side: int, device: torch.device) -> tuple[float, float, float]:
    """Median images/s of the batched form and of the loop, and the median of the ratios of neighbouring repeats."""
    config = AugmentConfig()
    generator = torch.Generator(device).manual_seed(0)
    draws = Draws(torch.Generator().manual_seed(0))
    images = torch.randint(0, 256, (batch, channels, side, side), dtype=torch.uint8, generator=generator, device=device)
    on_cpu = images.cpu()
    per_image = v2.Compose(
        [
            v2.RandAugment(config.num_ops, config.magnitude),
            v2.RandomCrop(side, padding=config.crop_padding, padding_mode="reflect"),
            v2.RandomHorizontalFlip(),
        ]
    )

    def batched() -> torch.Tensor:
        return strong(images, draws, config, flip=True)

    def loop() -> torch.Tensor:
        return torch.stack([per_image(image) for image in on_cpu]).to(device)

    batched()
    loop()
    pairs = [(seconds_per_call(batched, device), seconds_per_call(loop, device)) for _ in range(REPEATS)]
    batched_rate, loop_rate = (batch / statistics.median(times) for times in zip(*pairs, strict=True))
    return batched_rate, loop_rate, statistics.median(slow / fast for fast, slow in pairs)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # torchvision's transforms draw from the global generator
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    table = Table(title="strong view, images/s: median of repeats")
    for heading in ("device", "images", "batch", "batched", "loop", "ratio"):
        table.add_column(heading, justify="right")
    for device in devices:
        for channels, side in ((1, 28), (3, 32)):
            for batch in (64, 256):
                batched, loop, ratio = compare(batch, channels, side, device)
                size = f"{channels}x{side}x{side}"
                table.add_row(device.type, size, str(batch), f"{batched:,.0f}", f"{loop:,.0f}", f"{ratio:.1f}")
    console = Console()
    console.print(table)
    console.print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {platform.machine()}")
    if torch.cuda.is_available():
        console.print(torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
