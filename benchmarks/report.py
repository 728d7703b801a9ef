"""What stands below every report of a benchmark."""

from importlib.metadata import version

import torch

from cada.hardware import cpu_has_bfloat16
from cada.hub.record import environment


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
