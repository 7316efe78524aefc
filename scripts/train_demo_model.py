"""Train the small HunyuanVideo pipeline that ships with the package.

It has five stages; the long ones can be resumed, so that each call takes only minutes:

    python scripts/train_demo_model.py --stage text --work-dir runs/demo --seconds 60
    python scripts/train_demo_model.py --stage vae --work-dir runs/demo --seconds 560
    python scripts/train_demo_model.py --stage decoder --work-dir runs/demo --seconds 300
    python scripts/train_demo_model.py --stage transformer --work-dir runs/demo --seconds 560
    python scripts/train_demo_model.py --stage package --work-dir runs/demo

The decoder stage trains only the VAE's decoder and leaves the latents unchanged, so it may run
before, after or during the transformer stage. A stage in two calls needs the total length:

    python scripts/train_demo_model.py --stage transformer --work-dir runs/demo --seconds 560 \
        --total-seconds 800
    python scripts/train_demo_model.py --stage transformer --work-dir runs/demo --seconds 330 \
        --total-seconds 800 --resume

To refine a finished model instead, give its folder to the first call of the vae, decoder or
transformer stage: `--start-from xattn_video/pipelines/demo/model`. The transformer then sees other
frame sizes more often than the default size.

`--seconds` limits the wall time of a call, imports and final measurements included.
`--total-seconds` is the length of the stage's learning-rate schedule in training seconds over all
its calls. To continue on another machine, copy `vae.pt`, `text.pt`, `*.ckpt.*` and `training.json`
from the work directory. Clips are rendered on the fly from seeds; nothing is downloaded.
The transformer stage needs torch 2.9 or later, for `torch.optim.Muon`.
"""

import argparse
import random
import time
from pathlib import Path

STARTED = time.time()


def main() -> int:
    """Run one stage."""
    arguments = _parse_arguments()

    # Imported late, so that --help is fast and the clock includes the imports.
    import torch

    from demo_training import package_stage, text_stage, transformer_stage, vae_stage
    from demo_training.training_plan import SMOKE, Plan, TrainingJob
    from demo_training.weights import inherit_reports
    from xattn_video.files import user_path

    job = TrainingJob(
        stage=arguments.stage,
        work_dir=user_path(arguments.work_dir),
        started=STARTED,
        seconds=arguments.seconds,
        total_seconds=arguments.total_seconds,
        resume=arguments.resume,
        start_from=arguments.start_from and user_path(arguments.start_from),
        seed=arguments.seed,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        plan=SMOKE if arguments.smoke else Plan(),
    )
    job.work_dir.mkdir(parents=True, exist_ok=True)
    if job.start_from is not None:
        inherit_reports(job.work_dir, job.start_from)
    torch.manual_seed(job.seed)
    random.seed(job.seed)
    torch.backends.cudnn.benchmark = job.stage != "package"
    # Kernels to try for each shape; trying all took half a minute of the VAE stage.
    torch.backends.cudnn.benchmark_limit = 4
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = True
    name = torch.cuda.get_device_name() if job.device.type == "cuda" else "CPU"
    job.log(f"{job.stage} on {name}, torch {torch.__version__}")
    stages = {
        "vae": vae_stage.run,
        "decoder": vae_stage.run,
        "text": text_stage.run,
        "transformer": transformer_stage.run,
        "package": package_stage.run,
    }
    stages[job.stage](job)
    job.log("done")
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stage", required=True, choices=("vae", "decoder", "text", "transformer", "package")
    )
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=560.0)
    parser.add_argument("--total-seconds", type=float)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--start-from", type=Path, help="a finished model to refine further")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes, for a quick check on a CPU"
    )
    return parser.parse_args()


if __name__ == "__main__":
    from xattn_video.reporting.endings import run_script

    run_script(main)
