"""Checks what VBench needs for each dimension, and lists what is missing."""

import json
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

WORKER = Path(__file__).with_name("vbench_worker.py")
VBENCH_VERSION = "0.1.5"
TORCH_HOME = "torch"
HUGGING_FACE_HOME = "huggingface"


@dataclass(frozen=True, slots=True)
class Weights:
    """A file or folder that VBench reads.

    Attributes:
        path: Its path in the folder of weights.
        source: Where to get it: the address of a file, or a command.
        sha256: The beginning of its checksum if the source states it, else "".
    """

    path: str
    source: str
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Needs:
    """What one dimension needs in addition to vbench itself."""

    modules: tuple[str, ...] = ()
    weights: tuple[Weights, ...] = ()


_HUB = "https://huggingface.co/OpenGVLab/VBench_Used_Models/resolve/main"
_CLIP = "https://openaipublic.azureedge.net/clip/models"
_VIT_B_SUM = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
_VIT_L_SUM = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
_VIT_B = Weights("clip_model/ViT-B-32.pt", f"{_CLIP}/{_VIT_B_SUM}/ViT-B-32.pt", sha256=_VIT_B_SUM)
_VIT_L = Weights("clip_model/ViT-L-14.pt", f"{_CLIP}/{_VIT_L_SUM}/ViT-L-14.pt", sha256=_VIT_L_SUM)
_DINO = "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"
_BERT = Weights(
    f"{HUGGING_FACE_HOME}/hub/models--bert-base-uncased/snapshots",
    "huggingface-cli download bert-base-uncased --cache-dir (this folder's)/huggingface/hub",
)
_CLIP_MODULES = ("clip", "pkg_resources")
_GRIT = Needs(
    ("detectron2",),
    (
        Weights(
            "grit_model/grit_b_densecap_objectdet.pth", f"{_HUB}/grit_b_densecap_objectdet.pth"
        ),
        _BERT,
    ),
)
_VICLIP = Needs(
    (*_CLIP_MODULES, "timm"),
    (
        Weights("ViCLIP/ViClip-InternVid-10M-FLT.pth", f"{_HUB}/ViClip-InternVid-10M-FLT.pth"),
        Weights(
            "ViCLIP/bpe_simple_vocab_16e6.txt.gz",
            "https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz",
        ),
    ),
)
NEEDS = {
    "temporal_flickering": Needs(),
    "subject_consistency": Needs(
        weights=(
            Weights(
                "dino_model/facebookresearch_dino_main/hubconf.py",
                "git clone https://github.com/facebookresearch/dino",
            ),
            Weights("dino_model/dino_vitbase16_pretrain.pth", _DINO),
            # DINO's own loader takes no path and looks in this folder.
            Weights(f"{TORCH_HOME}/hub/checkpoints/dino_vitbase16_pretrain.pth", _DINO),
        )
    ),
    "background_consistency": Needs(_CLIP_MODULES, (_VIT_B,)),
    "motion_smoothness": Needs(
        ("omegaconf",),
        (
            Weights(
                "amt_model/amt-s.pth",
                "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth",
            ),
        ),
    ),
    "dynamic_degree": Needs(
        ("easydict",),
        (
            Weights(
                "raft_model/models/raft-things.pth",
                "unzip https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip",
            ),
        ),
    ),
    "aesthetic_quality": Needs(
        _CLIP_MODULES,
        (
            _VIT_L,
            Weights(
                "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
                "https://raw.githubusercontent.com/LAION-AI/aesthetic-predictor/main/"
                "sa_0_4_vit_l_14_linear.pth",
            ),
        ),
    ),
    "imaging_quality": Needs(
        ("pyiqa",),
        (
            Weights(
                "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
                "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/"
                "musiq_spaq_ckpt-358bb6af.pth",
                # torch.hub puts the beginning of the checksum into file names.
                sha256="358bb6af",
            ),
        ),
    ),
    "object_class": _GRIT,
    "multiple_objects": _GRIT,
    "color": _GRIT,
    "spatial_relationship": _GRIT,
    "human_action": Needs(
        ("timm", *_CLIP_MODULES),
        (
            Weights(
                "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",
                f"{_HUB}/l16_ptk710_ftk710_ftk400_f16_res224.pth",
            ),
        ),
    ),
    "scene": Needs(
        ("transformers", "timm", "fairscale"),
        (
            Weights(
                "caption_model/tag2text_swin_14m.pth",
                "https://huggingface.co/spaces/xinyu1205/recognize-anything/resolve/main/"
                "tag2text_swin_14m.pth",
            ),
            _BERT,
        ),
    ),
    "appearance_style": Needs(_CLIP_MODULES, (_VIT_B,)),
    "temporal_style": _VICLIP,
    "overall_consistency": _VICLIP,
}
_COMMON_MODULES = ("torch", "torchvision", "cv2", "decord")
_REMEDIES = {
    "detectron2": "pip install --no-build-isolation "
    "git+https://github.com/facebookresearch/detectron2.git",
    "pkg_resources": "pip install 'setuptools<81'",
    "clip": "pip install openai-clip",
    "cv2": "pip install opencv-python 'numpy<2'",
}


@dataclass(frozen=True, slots=True)
class Environment:
    """VBench's own Python environment.

    Attributes:
        python: Its interpreter.
        missing: Modules that a dimension needs and that are not installed.
    """

    python: Path
    missing: frozenset[str]


@dataclass(frozen=True, slots=True)
class Missing:
    """One thing that a dimension lacks.

    Attributes:
        what: Its name.
        where: Where it belongs.
        source: Where to get it.
    """

    what: str
    where: str
    source: str


def probe_environment(python: Path) -> Environment:
    """Inspect VBench's environment.

    Raises:
        ValueError: The environment does not exist, or lacks vbench in the right version.
    """
    remedy = (
        "make it with python -m eval_vbench.setup_vbench DIR and give "
        "--vbench-python DIR/bin/python"
    )
    modules = {name for needs in NEEDS.values() for name in needs.modules}
    command = [str(python), str(WORKER), "probe", *sorted({*modules, *_COMMON_MODULES})]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except OSError as error:
        raise ValueError(f"cannot run {str(python)!r}: {error.strerror}; {remedy}.") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{str(python)!r} fails: {last}; {remedy}.") from None
    try:
        found = json.loads(answer.stdout)
    except ValueError:
        raise ValueError(f"{str(python)!r} is no Python with VBench; {remedy}.") from None
    if found["vbench"] != VBENCH_VERSION:
        version = found["vbench"]
        has = "has no vbench" if version is None else f"has vbench {version}"
        raise ValueError(f"{str(python)!r} {has}, expected {VBENCH_VERSION}; {remedy}.")
    return Environment(python, frozenset(found["missing"]))


def missing_needs(dimension: str, environment: Environment, weights_folder: Path) -> list[Missing]:
    """What a dimension lacks; an empty list if it can be scored."""
    return missing_modules(dimension, environment) + [
        Missing(Path(weights.path).name, str(weights_folder / weights.path), weights.source)
        for weights in NEEDS[dimension].weights
        if not is_there(weights_folder / weights.path)
    ]


def missing_modules(dimension: str, environment: Environment) -> list[Missing]:
    """The modules that a dimension lacks."""
    python = str(environment.python)
    return [
        Missing(f"module {name}", python, _REMEDIES.get(name, f"pip install {name}"))
        for name in (*_COMMON_MODULES, *NEEDS[dimension].modules)
        if name in environment.missing
    ]


def preflight_table(lacking: dict[str, list[Missing]], scored: Iterable[str]) -> str:
    """What can be scored; for the rest, what is missing, where it belongs and where to get it."""
    scored = set(scored)
    lines = []
    for dimension, missing in lacking.items():
        state = "scored already" if dimension in scored else "ready"
        lines.append(f"{dimension:<24}{f'lacks {len(missing)}' if missing else state}")
        lines += [_missing_line(entry) for entry in missing]
    return "\n".join(lines)


def _missing_line(entry: Missing) -> str:
    return f"    {entry.what}\n        to    {entry.where}\n        from  {entry.source}"


def is_there(path: Path) -> bool:
    """Whether a file or folder exists and is not empty; a failed wget leaves empty files."""
    if path.is_dir():
        return any(path.iterdir())
    return path.is_file() and path.stat().st_size > 0
