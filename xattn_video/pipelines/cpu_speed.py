"""What a CPU's dense attention is like, which sparse attention has to beat."""

import torch


def cpu_has(capability: str) -> bool:
    """Whether the CPU has one of `torch.cpu.get_capabilities`; False where torch cannot tell."""
    # Older torch cannot be asked.
    ask = getattr(torch.cpu, "get_capabilities", None)
    return bool(ask and ask().get(capability))


def has_fast_dense(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a CPU multiplies matrices of the dtype in hardware of its own (AMX).

    Dense attention gains most from it; benchmarks/NOTES.md tells what was measured.
    """
    return device.type == "cpu" and dtype == torch.bfloat16 and cpu_has("amx_bf16")


def what_pays(device: torch.device, dtype: torch.dtype) -> str:
    """What to change where sparse steps took longer than dense ones."""
    if has_fast_dense(device, dtype):
        return (
            "dense attention is fast on this CPU in bfloat16 (AMX), so sparse attention gains "
            "only "
            "at low densities: lower the threshold"
        )
    if device.type == "cpu":
        return f"on a CPU in {str(dtype).removeprefix('torch.')}, {_USUAL}"
    return _USUAL


_USUAL = "longer videos and lower thresholds gain more"
