"""Compares a dense run with sparse runs.

python -m eval_vbench.report --dense runs/dense --sparse runs/xattn-0.95
"""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from eval_vbench.fidelity import measure_fidelity
from eval_vbench.report_page import report_page, report_values
from eval_vbench.report_plot import plot_report
from eval_vbench.report_web import report_web_page
from eval_vbench.run_comparison import CompleteRun, check_comparable, compare, load_run
from eval_vbench.run_folder import RunFolder
from xattn_video.errors import require_packages
from xattn_video.files import check_run_folder, write_json, write_text
from xattn_video.measure.similarity import VMAF_LEFT_OUT, Scorer
from xattn_video.options.command import CONTEXT_SETTINGS, AsJson, command
from xattn_video.reporting.console import output_console, print_message, written_name
from xattn_video.reporting.endings import ErrorsToExitCodes, OneLineCommand

_FILES = ("report.md", "report.html", "report.json", "report.png")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    cls=OneLineCommand,
    context_settings=CONTEXT_SETTINGS,
    epilog="Example: python -m eval_vbench.report --dense runs/dense --sparse runs/xattn-0.95",
)
@command
def main(
    dense: Annotated[Path, typer.Option(help="The run with dense attention.")],
    sparse: Annotated[list[Path], typer.Option(help="A sparse run; can be repeated.")],
    errors: ErrorsToExitCodes,
    output: Annotated[
        Path, typer.Option(help=f"Folder for {', '.join(_FILES[:-1])} and {_FILES[-1]}.")
    ] = Path("report"),
    fidelity: Annotated[
        bool, typer.Option(help="Measure PSNR, SSIM and the other fidelity metrics.")
    ] = (True),
    device: Annotated[str, typer.Option(help="Device for these metrics: cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Compare runs: VBench's dimensions, fidelity, density, time."""
    from xattn_video.pipelines.loading import LoadOptions

    device = str(LoadOptions(device=device).resolved_device)
    folders = [dense, *sparse]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("a run is given twice; compare different runs.")
    require_packages("reports", "matplotlib", *["torchmetrics"] * fidelity)
    reference, *runs = (load_run(RunFolder(folder)) for folder in folders)
    for run in runs:
        check_comparable(reference, run)
    check_run_folder(output)
    replaced = any((output / name).exists() for name in _FILES)
    errors.running = True
    values, page = _write(reference, runs, output, fidelity, device)
    written = f"report     {written_name(output, replaced=replaced)}"
    if as_json:
        typer.echo(json.dumps(values, indent=2))
        print_message(written)
        return
    console = output_console()
    console.print(page, soft_wrap=True)
    console.print(written, soft_wrap=True)


def _write(
    dense: CompleteRun, runs: list[CompleteRun], output: Path, fidelity: bool, device: str
) -> tuple[dict[str, Any], str]:
    """Measure, write the files, and return the content of report.json and report.md."""
    notes = []
    if not fidelity:
        notes.append("PSNR, SSIM and LPIPS were not requested.")
    elif not dense.settings["lossless"]:
        notes.append("PSNR, SSIM and LPIPS need lossless copies, which these runs do not keep.")
        fidelity = False
    scorer = Scorer(device) if fidelity else None
    if scorer is not None:
        notes += [f"{name} was not measured: {why}" for name, why in scorer.missing.items()]
    results = []
    # A dictionary, to drop duplicates and keep the order.
    left_out: dict[str, None] = {}
    for run in runs:
        pairs = {}
        if scorer is not None:
            pairs = measure_fidelity(
                dense.folder,
                run.folder,
                run.items,
                scorer,
                print_message,
            )
        results.append(compare(dense, run, pairs))
        if any(pair.get("plain") for pair in pairs.values()):
            left_out[f"VMAF was left out: {VMAF_LEFT_OUT}"] = None
    notes += left_out
    plotted = plot_report(output / "report.png", dense, results)
    page = report_page(dense, results, notes, "report.png" if plotted else "")
    values = report_values(dense, results) | {"notes": notes}
    write_json(output / "report.json", values)
    write_text(output / "report.md", page)
    plot = (output / "report.png").read_bytes() if plotted else None
    command_line = shlex.join(["python", "-m", "eval_vbench.report", *sys.argv[1:]])
    web_page = report_web_page(dense, results, notes, plot, command_line, scorer is not None)
    write_text(output / "report.html", web_page.html())
    if not plotted:
        # Of an earlier report.
        (output / "report.png").unlink(missing_ok=True)
    return values, page


if __name__ == "__main__":
    app()
