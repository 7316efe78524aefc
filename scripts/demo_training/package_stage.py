"""Packages the finished pipeline: bfloat16 weights in small files, training record, pictures."""

import json
import platform
import random
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

from demo_training.models import build_transformer
from demo_training.pictures import save_sheet
from demo_training.text_stage import load_text_stack
from demo_training.training_plan import Size, TrainingJob
from demo_training.vae_stage import load_vae
from demo_training.weights import TrainedWeights, load_checkpoint
from xattn_video.files import write_json
from xattn_video.pipelines.demo.grammar import sample_scene

MAX_FILE_BYTES = 15_000_000
MAX_TOTAL_BYTES = 25_000_000


def run(job: TrainingJob) -> None:
    """Write `model/`, a folder for `HunyuanVideoPipeline.from_pretrained`, and `sheets/`."""
    model_dir = job.work_dir / "model"
    state = load_checkpoint(job.work_dir, "transformer")
    pipeline = _assemble(job, state)
    pipeline.save_pretrained(model_dir, max_shard_size="12MB")
    provenance = _provenance(job, state)
    write_json(model_dir / "TRAINING.json", provenance)
    _check_files(job, model_dir)

    loaded = HunyuanVideoPipeline.from_pretrained(
        model_dir, dtype=job.dtype, local_files_only=True
    )
    _draw_sheets(job, loaded.to(job.device))


def _assemble(job: TrainingJob, state: dict[str, Any]) -> HunyuanVideoPipeline:
    """The pipeline with the moving average of the trained weights."""
    text = load_text_stack(job)
    transformer = build_transformer(job.plan.transformer)
    trained = TrainedWeights(
        [transformer],
        dtype=torch.bfloat16,
        stored_dtype=torch.bfloat16,
        betas=(0.9, 0.98),
        weight_decay=0.0,
        ema_decay=0.0,
    )
    trained.load_state(state["weights"])
    trained.show_average()
    return HunyuanVideoPipeline(
        text_encoder=text.text_encoder.to("cpu", torch.bfloat16),
        tokenizer=text.tokenizer,
        transformer=transformer.eval(),
        vae=load_vae(job).to("cpu", torch.bfloat16),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=text.text_encoder_2.to("cpu", torch.bfloat16),
        tokenizer_2=text.tokenizer_2,
    )


def _provenance(job: TrainingJob, state: dict[str, Any]) -> dict[str, Any]:
    """How the weights were trained."""
    path = job.work_dir / "training.json"
    return {
        "made_by": "scripts/train_demo_model.py",
        "seed": job.seed,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "calls": json.loads(path.read_text()) if path.is_file() else [],
        "transformer_history": state["history"][:: max(1, len(state["history"]) // 20)],
    }


def _check_files(job: TrainingJob, model_dir: Path) -> None:
    """Make the files readable by everyone, and check the limits on their size."""
    files = sorted(path for path in model_dir.rglob("*") if path.is_file())
    total = 0
    for path in files:
        path.chmod(0o644)
        size = path.stat().st_size
        total += size
        job.log(f"{size:>10,} {path.relative_to(model_dir)}")
        assert size <= MAX_FILE_BYTES, path
    job.log(f"{total:>10,} in all")
    assert total <= MAX_TOTAL_BYTES


def _draw_sheets(job: TrainingJob, pipeline: HunyuanVideoPipeline) -> None:
    """Draw contact sheets of held-out prompts at every frame size."""
    plan, rng = job.plan, random.Random(f"{job.seed}/sheets")
    sheets = job.work_dir / "sheets"
    sheets.mkdir(exist_ok=True)
    pipeline.set_progress_bar_config(disable=True)
    counts: dict[Size, tuple[int, ...]] = {
        plan.square: (1, 1, 1, 1, 1, 1, 2, 2, 2),
        plan.wide: (1, 2),
        plan.tall: (1,),
        plan.large: (1, 2),
    }
    for size, objects in counts.items():
        clips = []
        for num_objects in objects[:1] if job.is_smoke else objects:
            prompt = sample_scene(rng, num_objects, held_out=True).prompt
            begun = time.time()
            video = pipeline(
                prompt,
                height=size[0],
                width=size[1],
                num_frames=65,
                num_inference_steps=plan.inference_steps,
                generator=torch.Generator().manual_seed(job.seed),
                output_type="pt",
            ).frames[0]
            clips.append(video.transpose(0, 1).float().cpu())
            job.log(f"{size[1]}x{size[0]}x65 {time.time() - begun:.1f} s: {prompt}")
        save_sheet(clips, sheets / f"{size[1]}x{size[0]}.png")
