"""What the processor can do, against what Linux says of it."""

import re
from pathlib import Path

import pytest
import torch

from cada.hardware import cpu_has_bfloat16


@pytest.mark.parametrize("older_torch", [False, True])
def test_instructions_are_those_that_linux_names(older_torch, monkeypatch):
    if older_torch:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1]
    assert cpu_has_bfloat16() == bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("avx2", "avx512_f", "avx512_vnni", "amx_tile"), False),  # Skylake and Ice Lake multiply integers so
        (("avx2", "avx512_f", "avx512_bf16"), True),
        (("amx_tile", "amx_bf16"), True),
        (("neon", "bf16"), True),
        (("neon", "sve"), False),
    ],
)
def test_instructions_of_other_processors(names, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True) | {"avx10_2": False})
    assert cpu_has_bfloat16() is expected
