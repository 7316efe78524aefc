"""The tables of docs/language_demo_model.md, from what a training writes beside the weights."""

from pathlib import Path
from typing import Any

from benchmarks.results_files import read_json
from xattn_video.reporting.machine import describe_versions
from xattn_video.reporting.tables import Table

# RULER's names for the forms of scripts/language_training/forms.py.
_RULER = {
    "many_keys": "niah_multikey_2",
    "many_uuids": "niah_multikey_3",
    "one_key": "niah_single_1",
    "several_values": "niah_multivalue",
    "several_keys": "niah_multiquery",
}


def training(folder: Path) -> str:
    """A row for each call of the training script."""
    record = _read(folder / "TRAINING.json")
    if record is None:
        return "No weights are committed yet.\n"
    columns = {
        "call": lambda call: f"`{call['command']}`",
        "on": lambda call: call["device"],
        "steps": lambda call: f"{call['steps']:,}",
        "minutes": lambda call: f"{call['training_seconds'] / 60:.1f}",
    }
    total = sum(call["training_seconds"] for call in record["calls"]) / 60
    table = Table.of(record["calls"], columns).markdown()
    return f"{table}\n\n- {total:.1f} minutes in all; {describe_versions(record['versions'])}\n"


def evaluation(folder: Path) -> str:
    """A row for each form: the share of right answers by length, dense and sparse."""
    record = _read(folder / "evaluation.json")
    if record is None:
        return "No evaluation is committed yet.\n"
    shares = record["shares"]
    lengths = list(shares["dense"])
    headings = ("form", "in RULER", *(f"{int(length):,}" for length in lengths))
    forms = dict.fromkeys(form for length in lengths for form in shares["dense"][length])
    rows = (
        (form, _RULER[form], *(_cell(shares, length, form) for length in lengths))
        for form in forms
    )
    table = Table(headings, tuple(rows), num_left=2).markdown()
    return (
        f"{table}\n\n- share of right answers with dense attention / with tau 0.9, stride 8, and "
        f"density; {record['samples']} prompts each, {record['dtype']}, {record['device']}: "
        f"{describe_versions(record['versions'])}\n"
    )


def _cell(shares: dict[str, Any], length: str, form: str) -> str:
    """Empty where a text of the length has no room for the form."""
    dense, sparse = (shares[setting][length].get(form) for setting in ("dense", "0.9"))
    if dense is None:
        return ""
    return f"{dense['right']:.2f} / {sparse['right']:.2f}, {sparse['density']:.2f}"


def _read(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None
