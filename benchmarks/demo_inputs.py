"""Writes queries, keys and values of the demo model, for `benchmarks.attention --inputs`.

    python -m benchmarks.demo_inputs --height 512 --width 512 --output demo.safetensors

They come from a dense generation and are real inputs for selection at relevant sizes. The demo
model was trained at 256x256; larger videos look worse, but their attention is real.
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs_file import save_inputs
from benchmarks.script_options import HERE, comma_separated
from xattn_video import XAttnProcessor
from xattn_video.files import check_output_path, user_path
from xattn_video.pipelines.demo import load_demo_pipeline
from xattn_video.processors.recorder import AttendedLayer
from xattn_video.reporting.endings import run_script

PROMPT = (
    "a red circle moving left to right and a blue square moving top to bottom "
    "over a white background"
)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--height", type=int, default=512)
    add("--width", type=int, default=512)
    add("--num-frames", type=int, default=65)
    add("--num-inference-steps", type=int, default=25)
    add("--prompt", default=PROMPT)
    add("--seed", type=int, default=0)
    steps = "denoising steps to capture, counted from 0"
    add("--steps", type=comma_separated(int), default=[6, 18], help=steps)
    layers = ["transformer_blocks.1", "single_transformer_blocks.1", "single_transformer_blocks.4"]
    add("--layers", type=comma_separated(str), default=layers)
    add("--device", default=HERE)
    add("--output", type=user_path, required=True)
    arguments = parser.parse_args(words)
    check_output_path(arguments.output, (".safetensors",))

    pipe = load_demo_pipeline(device=arguments.device)
    captured = capture(pipe, arguments)
    size = f"{arguments.height}x{arguments.width}x{arguments.num_frames}"
    captures = {
        f"demo-{size}-step{step}-{layer}": tensors
        for (step, layer), tensors in captured.tensors.items()
    }
    save_inputs(arguments.output, captures, captured.num_text_tokens)
    for name, (query, _, _) in captures.items():
        print(f"{name}: {list(query.shape)}, {captured.num_text_tokens} of them text")


def capture(pipe: Any, arguments: argparse.Namespace) -> "Capture":
    """Generate with dense attention until the last step to capture is done."""
    processor = XAttnProcessor(threshold=1.0)
    pipe.transformer.set_attn_processor(processor)
    unknown = set(arguments.layers) - set(processor.layer_names)
    if unknown:
        raise ValueError(
            f"the transformer has no layer {sorted(unknown)[0]!r}; "
            f"expected some of {', '.join(processor.layer_names)}."
        )

    captured = Capture(processor, arguments.layers, arguments.steps)
    processor.observers.append(captured)

    def stop_after(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= max(arguments.steps)
        return tensors

    with torch.no_grad():
        pipe(
            prompt=arguments.prompt,
            height=arguments.height,
            width=arguments.width,
            num_frames=arguments.num_frames,
            num_inference_steps=arguments.num_inference_steps,
            generator=torch.Generator("cpu").manual_seed(arguments.seed),
            output_type="latent",
            callback_on_step_end=stop_after,
        )
    return captured


class Capture:
    """Keeps the valid queries, keys and values of some layers and steps."""

    def __init__(self, processor: XAttnProcessor, layers: list[str], steps: list[int]) -> None:
        self.tensors: dict[tuple[int, str], tuple[Tensor, Tensor, Tensor]] = {}
        self.num_text_tokens = 0
        self._processor = processor
        self._layers = set(layers)
        self._steps = set(steps)

    def __call__(self, seen: AttendedLayer) -> None:
        step = self._processor.step_index
        if step is None or step not in self._steps or seen.layer not in self._layers:
            return
        layout = seen.forward.layout
        length = layout.key_lengths[0]
        self.num_text_tokens = length - layout.num_video_tokens
        query, key, value = (
            tokens[:, :length].clone() for tokens in (seen.query, seen.key, seen.value)
        )
        self.tensors[step, seen.layer] = (query, key, value)


if __name__ == "__main__":
    run_script(main)
