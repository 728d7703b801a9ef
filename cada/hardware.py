"""What the processor can do."""

from pathlib import Path

import torch


# As torch and Linux name them: of x86, of x86 with matrix units, of ARM.
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


def cpu_has_bfloat16() -> bool:
    """
    Whether the processor multiplies in bfloat16 by instructions of its own. Without them torch converts the numbers on
    the way, which takes longer than float32: six times on a processor with AVX2 alone.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in BFLOAT16_INSTRUCTIONS)
    try:  # older torch; macOS and Windows have no such file
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return not set(BFLOAT16_INSTRUCTIONS).isdisjoint(words)
