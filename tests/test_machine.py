"""The machine that a figure belongs to."""

import importlib.metadata

import torch

from xattn_video.reporting.machine import machine_record


def test_a_record_names_the_packages_that_are_installed(monkeypatch):
    present = {"triton": "3.7.1", "flash-attn-4": "4.0"}

    def version(name):
        if name not in present:
            raise importlib.metadata.PackageNotFoundError(name)
        return present[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    versions = machine_record(torch.device("cpu"))["versions"]
    assert {name: versions[name] for name in present} == present
    assert set(versions) == {*present, "xattn_video", "torch"}
