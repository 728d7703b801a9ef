"""What all reports of benchmarks have: means with their spread, and what stands below."""

import statistics
from importlib.metadata import version

import torch

from cada.hardware import cpu_has_bfloat16
from cada.hub.record import environment


def spread(values: list[float], sign: str = "") -> str:
    """The mean over the seeds, with the standard deviation where there are several."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{deviation}"


def footer(command: str, packages: tuple[str, ...] = ()) -> list[str]:
    """Lines: the command, the date, the machine with its instructions and threads, versions (also of `packages`)."""
    where = environment()
    versions = {**where["versions"], **{package: version(package) for package in packages}}
    instructions = f"{torch.backends.cpu.get_cpu_capability()}{' with bfloat16' if cpu_has_bfloat16() else ''}"
    return [
        f"- Command: `{command}`",
        f"- Date: {where['date']}",
        f"- Machine: {where['hardware']}; {instructions}; {torch.get_num_threads()} threads",
        f"- Versions: {', '.join(f'{package} {number}' for package, number in versions.items())}",
        "",
    ]
