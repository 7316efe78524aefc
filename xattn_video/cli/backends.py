"""`xattn-video backends`: which backends can run here, and why the others cannot."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from xattn_video.options.command import AsJson, command
from xattn_video.options.groups import loading
from xattn_video.reporting.console import output_console

if TYPE_CHECKING:
    from xattn_video.pipelines.loading import LoadOptions


@command
def backends(
    load: Annotated["LoadOptions", loading("device", "dtype")],
    head_dim: Annotated[int, typer.Option(help="Size of an attention head.")] = 128,
    block_size: Annotated[int, typer.Option(help="Tokens in a block.")] = 128,
    as_json: AsJson = False,
) -> None:
    """List the backends that can run here, and every reason why the others cannot."""
    import torch

    from xattn_video.backends.table import AUTO_ORDER, available_backends
    from xattn_video.ops.arguments import check_block_size

    check_block_size(block_size)
    if head_dim < 1:
        raise ValueError(f"head_dim must be at least 1, got {head_dim}; use 128.")
    place, kind = load.resolved_device, load.resolved_dtype
    reasons = available_backends(place, dtype=kind, head_dim=head_dim, block_size=block_size)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else str(place)
    order = [b for b in AUTO_ORDER.get(place.type, ("torch_gather",)) if not reasons[b]]
    if as_json:
        problem = {"device": name, "dtype": str(kind).removeprefix("torch.")}
        sizes = {"head_dim": head_dim, "block_size": block_size}
        found = {"auto": order[0] if order else None, "reasons_against": reasons}
        typer.echo(json.dumps({**problem, **sizes, **found}, indent=2))
        return
    console = output_console()
    console.print(
        f"On {name}, {str(kind).removeprefix('torch.')}, "
        f"head size {head_dim}, blocks of {block_size} tokens:",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for backend, why in reasons.items():
        if why:
            table.add_row(backend, Text("no", "red"), "\n".join(f"- {reason}" for reason in why))
        else:
            table.add_row(backend, Text("yes", "green"), "")
    console.print(table)
    console.print(f"auto takes {order[0]}." if order else "auto finds no backend that can run.")
