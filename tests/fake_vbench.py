"""A stand-in for the vbench package: its interface and its files, with made-up scores."""

from pathlib import Path

# Written as vbench/__init__.py. FAKE_VBENCH names what goes wrong.
_PACKAGE = """
import json, os, pathlib, signal, time

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.device, self.full_info, self.output = device, full_info_dir, output_path

    def evaluate(self, videos_path, name, dimension_list, local, read_frame, mode, **kwargs):
        assert local is True and os.environ["HF_HUB_OFFLINE"] == "1"
        (dimension,) = dimension_list
        wrong = os.environ.get("FAKE_VBENCH", "")
        if wrong == "raise":
            raise RuntimeError("the checkpoint does not fit")
        if wrong == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if wrong == "full disk":
            with open(os.path.join(videos_path, "filler"), "wb", buffering=0) as filler:
                while filler.write(bytes(512)):
                    pass
        if wrong == "waits":
            pathlib.Path(os.environ["FAKE_VBENCH_STARTED"]).write_text(str(os.getpid()))
            time.sleep(120)
        suffix = pathlib.Path(os.listdir(videos_path)[0]).suffix
        found = []
        if mode == "custom_input":
            names = os.listdir(videos_path)
            found = [os.path.join(videos_path, n) for n in names if n[-4:] in (".mp4", ".gif")]
        else:
            assert mode == "vbench_standard"
        for entry in json.load(open(self.full_info)):
            assert dimension in entry["dimension"]
            for index in range(5):
                path = os.path.join(videos_path, f"{entry['prompt_en']}-{index}{suffix}")
                if os.path.exists(path):
                    found.append(path)
        value = {"imaging_quality": 60.0, "dynamic_degree": True}.get(dimension, 0.9)
        results = [{"video_path": path, "video_results": value} for path in found]
        aggregate = 0.6 if dimension == "imaging_quality" else float(value)
        if wrong == "nan":
            aggregate, results = float("nan"), []
        if wrong == "drop":
            results = results[1:]
        if wrong == "nan video":
            results[0]["video_results"] = float("nan")
        if wrong == "cut":
            pathlib.Path(self.output, name + "_eval_results.json").write_text("{")
        elif wrong != "silent":
            file = os.path.join(self.output, name + "_eval_results.json")
            json.dump({dimension: [aggregate, results]}, open(file, "w"))
"""
_TORCH = """
device = str

class cuda:
    is_available = staticmethod(lambda: False)
"""
MODULES = (
    "clip",
    "cv2",
    "decord",
    "detectron2",
    "easydict",
    "fairscale",
    "omegaconf",
    "pkg_resources",
    "pyiqa",
    "timm",
    "torchvision",
)


def install_fake_vbench(folder: Path, version: str = "0.1.5") -> None:
    """Write the package and empty ones of all that it needs into a folder for PYTHONPATH."""
    (folder / "vbench").mkdir(parents=True)
    (folder / "vbench/__init__.py").write_text(_PACKAGE)
    metadata = folder / f"vbench-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vbench\nVersion: {version}\n"
    )
    for name in MODULES:
        (folder / f"{name}.py").touch()
    # The real one takes seconds to import.
    (folder / "torch.py").write_text(_TORCH)
