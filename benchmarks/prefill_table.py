"""The table of prefills on docs/long_context.md, from the reports of `xattn-video prefill`."""

from benchmarks.results_files import RESULTS, read_reports
from xattn_video.reporting.machine import describe_versions
from xattn_video.reporting.tables import Table, figure

PREFILLS = RESULTS / "prefill"


def render_prefills() -> str:
    """The table, with a row for each report by length of the prompt, and the machines."""
    files = sorted(read_reports(PREFILLS).values(), key=lambda file: file["tokens"])
    columns = {
        "weights": lambda file: file["model"],
        "tokens": lambda file: f"{file['tokens']:,}",
        "density": lambda file: f"{file['settings']['density']:g}",
        "sparse": lambda file: f"{file['runs']['sparse']['seconds']:.2f} s",
        "dense": lambda file: figure(file["runs"].get("dense", {}).get("seconds"), ".2f", " s"),
        "faster": lambda file: figure(file.get("speedup"), ".2f", "x"),
        "peak": lambda file: f"{file['runs']['sparse']['peak_memory_gib']:.1f} GiB",
        "planned": lambda file: f"{file['plan']['peak']:.1f} GiB",
    }
    facts = sorted(
        {
            f"- {file['device']}, {file['dtype']}, stride {file['settings']['stride']}, chunks of "
            f"{file['chunk_size']:,}: {describe_versions(file['versions'])}"
            for file in files
        }
    )
    return "\n".join([Table.of(files, columns).markdown(), "", *facts]) + "\n"
