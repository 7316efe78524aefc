"""How fast a CPU's dense attention is, which sparse attention has to beat."""

import torch


def cpu_has(capability: str) -> bool:
    """Whether the CPU has one of `torch.cpu.get_capabilities`; False if torch cannot tell."""
    # Older versions of torch lack the function.
    ask = getattr(torch.cpu, "get_capabilities", None)
    return bool(ask and ask().get(capability))


def has_fast_dense(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a CPU has matrix units for the dtype (AMX).

    Dense attention gains most from them; benchmarks/NOTES.md has the measurements.
    """
    return device.type == "cpu" and dtype == torch.bfloat16 and cpu_has("amx_bf16")


def what_pays(device: torch.device, dtype: torch.dtype) -> str:
    """Advice for a run whose sparse steps took longer than its dense ones."""
    if has_fast_dense(device, dtype):
        return (
            "dense attention is fast on this CPU in bfloat16 (AMX), so sparse attention gains "
            "only at low densities: lower the threshold"
        )
    if device.type == "cpu":
        return f"on a CPU in {str(dtype).removeprefix('torch.')}, {_USUAL}"
    return _USUAL


_USUAL = "longer videos and lower thresholds gain more"
