import copy
import threading

import pytest
import torch
from diffusers import DDIMPipeline
from hunyuan import generate, prompt, states, tiny_pipeline, tiny_transformer

from xattn_video import UnsupportedModelError, XAttnProcessor, enable_xattention

OPTIONS = {"stride": 4, "block_size": 8, "warmup_steps": 1, "min_tokens": 0}


@pytest.mark.parametrize("give", ["pipeline", "transformer", "compiled"])
def test_it_takes_a_pipeline_or_its_transformer(give):
    pipe = tiny_pipeline()
    model = {"pipeline": pipe, "transformer": pipe.transformer}.get(give)
    if model is None:
        model = torch.compile(pipe.transformer, backend="eager")
    handle = enable_xattention(model, 0.5, **OPTIONS)
    generate(pipe, 3)
    assert states(handle.processor.report()) == ["dense", "sparse", "sparse"]
    assert repr(handle.processor).startswith("XAttnProcessor(threshold=0.5, stride=4")


def test_disabling_restores_the_very_processors():
    pipe = tiny_pipeline()
    expected = generate(pipe)
    before = dict(pipe.transformer.attn_processors)
    handle = enable_xattention(pipe, 0.5, **OPTIONS)
    generate(pipe)
    handle.disable()
    after = pipe.transformer.attn_processors
    assert all(after[name] is processor for name, processor in before.items())
    assert not pipe.transformer._forward_pre_hooks
    assert not any(hasattr(module, "_xattn_slot") for module in pipe.transformer.modules())
    assert torch.equal(generate(pipe), expected)


def test_disabling_twice_is_harmless():
    transformer = tiny_transformer()
    handle = enable_xattention(transformer)
    handle.disable()
    other = XAttnProcessor()
    transformer.set_attn_processor(other)
    handle.disable()
    assert transformer.transformer_blocks[0].attn.processor is other


def test_the_report_outlives_it():
    pipe = tiny_pipeline()
    with enable_xattention(pipe, 0.5, **OPTIONS) as handle:
        generate(pipe, 3)
    generate(pipe, 5)
    assert handle.processor.report().summary().startswith("2/3 steps x 4/4 layers sparse")


def test_the_processor_set_again_still_knows_its_pipeline():
    pipe = tiny_pipeline()
    handle = enable_xattention(pipe, 0.5, refresh_every=3, **OPTIONS)
    expected, reported = generate(pipe, 6), handle.report().summary()
    for processors in (handle.processor, dict(pipe.transformer.attn_processors)):
        pipe.transformer.set_attn_processor(processors)
        assert handle.report().summary() == reported
        assert torch.equal(generate(pipe, 6), expected)
        assert handle.report().summary() == reported


def test_a_pass_of_a_second_thread_is_refused():
    pipe = tiny_pipeline()
    expected = generate(tiny_pipeline())
    handle = enable_xattention(pipe, 1.0, **OPTIONS)
    errors = []

    def run_beside(_, step, *__):
        # The step's pass is open: the thread runs while a layer does.
        if step == 1:
            hook = pipe.transformer.norm_out.register_forward_pre_hook(in_thread)
            hooks.append(hook)
        return {}

    def in_thread(*_):
        hooks.pop().remove()
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()

    def attempt():
        try:
            generate(tiny_pipeline(pipe.transformer))
        except RuntimeError as error:
            errors.append(str(error))

    hooks = []
    found = generate(pipe, callback_on_step_end=run_beside)
    assert errors[0].startswith("this transformer is in a forward pass of another thread")
    assert torch.allclose(found, expected, atol=1e-5)
    # The thread of another run may be another one, and may follow an interrupted pass.
    handle.processor._session._thread = 0
    handle.processor.reset()
    assert torch.allclose(generate(pipe), expected, atol=1e-5)


def test_a_disabled_handle_does_not_begin_again():
    handle = enable_xattention(tiny_transformer())
    handle.disable()
    with pytest.raises(RuntimeError, match="was disabled; call enable_xattention again"), handle:
        pass


def test_a_with_block_disables_after_an_error():
    pipe = tiny_pipeline()
    with pytest.raises(ZeroDivisionError), enable_xattention(pipe):
        raise ZeroDivisionError
    assert not pipe.transformer._forward_pre_hooks


def test_enabling_twice_raises():
    pipe = tiny_pipeline()
    handle = enable_xattention(pipe)
    with pytest.raises(RuntimeError, match=r"already enabled on this transformer; call disable"):
        enable_xattention(pipe.transformer)
    handle.disable()
    enable_xattention(pipe)


def test_a_wrong_threshold_leaves_the_model_alone():
    pipe = tiny_pipeline()
    before = dict(pipe.transformer.attn_processors)
    with pytest.raises(ValueError, match="threshold must lie in"):
        enable_xattention(pipe, 95)
    assert pipe.transformer.attn_processors == before


def test_what_has_no_hunyuan_video_transformer_is_refused():
    from diffusers import DDIMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    with pytest.raises(UnsupportedModelError, match="DDIMPipeline has no transformer"):
        enable_xattention(DDIMPipeline(unet, DDIMScheduler()))
    with pytest.raises(UnsupportedModelError, match="UNet2DModel; supported models: HunyuanVideo"):
        enable_xattention(unet)


def test_a_class_is_not_a_model():
    with pytest.raises(
        TypeError, match="must be an instance, got the class DDIMPipeline; use DDIM"
    ):
        enable_xattention(DDIMPipeline)


def test_the_transformer_does_not_keep_its_pipeline_alive():
    import gc
    import weakref

    pipe = tiny_pipeline()
    transformer = pipe.transformer
    enable_xattention(pipe, 0.5, cooldown_steps=1, **OPTIONS)
    reference = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert reference() is None
    with pytest.raises(ValueError, match="cooldown_steps needs the number of denoising steps"):
        generate_alone(transformer)


def test_another_pipeline_on_the_same_transformer_has_steps_of_its_own():
    pipe = tiny_pipeline()
    other = tiny_pipeline(pipe.transformer)
    handle = enable_xattention(pipe, 0.5, cooldown_steps=1, **OPTIONS)
    generate(pipe, 3)
    with pytest.raises(ValueError, match=r"cooldown_steps=\.\.\.\) on the pipeline that runs it"):
        generate(other, 5)
    generate(pipe, 4)
    assert states(handle.processor.report()) == ["dense", "sparse", "sparse", "dense"]


def generate_alone(transformer):
    """Two steps of a transformer without a pipeline."""
    from hunyuan import forward_inputs

    with torch.no_grad():
        for timestep in (900.0, 500.0):
            transformer(**forward_inputs(timestep))


def test_the_scoring_precision_reaches_the_scores(monkeypatch):
    from xattn_video.ops import scoring

    seen = []

    def score_in_8_bits(inputs, *, float8):
        seen.append(float8)
        return scoring.torch_block_scores(inputs)

    monkeypatch.setattr(scoring, "triton_unsupported_reasons", lambda *_, **__: [])
    monkeypatch.setattr(scoring, "triton_block_scores", score_in_8_bits)
    pipe = tiny_pipeline()
    enable_xattention(pipe, 0.5, **OPTIONS, scoring_precision="float8")
    generate(pipe, 3)
    assert seen
    assert all(seen)


def test_a_scoring_precision_that_cannot_be_had_stops_the_first_step(monkeypatch):
    from xattn_video.ops import scoring

    monkeypatch.setattr(scoring, "triton_unsupported_reasons", lambda *_, **__: ["no 8 bits."])
    pipe = tiny_pipeline()
    handle = enable_xattention(pipe, 0.5, **OPTIONS, scoring_precision="float8")
    with pytest.raises(ValueError, match='precision "float8" is not available: no 8 bits'):
        generate(pipe, 3)
    assert handle.processor.report().num_refused == 1
    assert states(handle.processor.report()) == []


def test_a_class_in_place_of_a_processor_is_told_so():
    transformer = tiny_transformer()
    with pytest.raises(TypeError, match=r"got the class XAttnProcessor; write XAttnProcessor\(\)"):
        transformer.set_attn_processor(XAttnProcessor)


def test_wrappers_are_taken_off_or_named():
    class Adapted(torch.nn.Module):
        """As PEFT wraps a model for LoRA."""

        def __init__(self, model):
            super().__init__()
            self.base_model = model

        def get_base_model(self):
            return self.base_model

    transformer = tiny_transformer()
    handle = enable_xattention(torch.compile(Adapted(transformer), backend="eager"))
    assert transformer.transformer_blocks[0].attn.processor is handle.processor
    handle.disable()
    with pytest.raises(UnsupportedModelError, match=r"DataParallel copies .* model\.module"):
        enable_xattention(torch.nn.DataParallel(transformer))


def test_a_negative_prompt_may_be_the_prompt():
    pipe = tiny_pipeline()
    processor = enable_xattention(pipe, 0.5, refresh_every=2, **OPTIONS).processor
    for num_steps in (2, 4, 4):
        generate(pipe, num_steps, true_cfg_scale=3.0, **prompt(prefix="negative_"))
        forwards = processor.report().forwards
        assert [one.step for one in forwards] == [n for n in range(num_steps) for _ in range(2)]
        assert [one.forward_pass for one in forwards] == [0, 1] * num_steps
    assert processor.report().refresh_steps == (0, 2)


def test_a_run_that_stopped_at_once_is_not_in_the_next_report(monkeypatch):
    pipe = tiny_pipeline()
    processor = enable_xattention(pipe, 0.5, **OPTIONS).processor
    monkeypatch.setattr(pipe.transformer.single_transformer_blocks[1], "forward", None)
    with pytest.raises(TypeError, match="NoneType"):
        generate(pipe)
    monkeypatch.undo()
    generate(pipe, **prompt(seed=3))
    assert states(processor.report()) == ["dense", "sparse", "sparse", "sparse"]


def test_a_copied_pipeline_is_followed_as_the_pipeline_was():
    pipe = tiny_pipeline()
    handle = enable_xattention(pipe, 0.5, cooldown_steps=1, **OPTIONS)
    twin = copy.deepcopy(copy.deepcopy(pipe))
    processor = twin.transformer.transformer_blocks[0].attn.processor
    for _ in range(2):
        generate(twin, 4)
        assert states(processor.report()) == ["dense", "sparse", "sparse", "dense"]
    assert handle.report().steps == ()
    generate(pipe, 3)
    assert states(handle.report()) == ["dense", "sparse", "dense"]
    assert processor.report().steps == (0, 1, 2, 3)


def test_a_transformer_copied_without_its_pipeline_is_told_how_to_use_its_processor():
    pipe = tiny_pipeline()
    enable_xattention(pipe, 0.5, cooldown_steps=1, **OPTIONS)
    other = tiny_pipeline(copy.deepcopy(pipe.transformer))
    with pytest.raises(ValueError, match=r"enable_xattention\(pipe, .*processor\.bind\("):
        generate(other, 4)
    processor = other.transformer.transformer_blocks[0].attn.processor
    processor.bind(other.transformer, pipeline=other)
    generate(other, 4)
    assert states(processor.report()) == ["dense", "sparse", "sparse", "dense"]


def test_a_processor_that_gave_a_layer_away_still_knows_the_pipeline():
    pipe = tiny_pipeline()
    processor = enable_xattention(pipe, 0.5, cooldown_steps=1, **OPTIONS).processor
    other = XAttnProcessor(0.5, **OPTIONS)
    pipe.transformer.transformer_blocks[0].attn.processor = other
    other.bind(pipe.transformer)
    generate(pipe, 4)
    assert states(processor.report()) == ["dense", "sparse", "sparse", "dense"]
    assert states(other.report()) == ["dense", "sparse", "sparse", "sparse"]


def test_a_second_pipeline_is_told_how_to_share_the_processor():
    pipe = tiny_pipeline()
    other = tiny_pipeline(pipe.transformer)
    handle = enable_xattention(pipe, 0.5, cooldown_steps=1, **OPTIONS)
    with pytest.raises(RuntimeError, match=r"processor\.bind\(pipe\.transformer, pipeline=pipe\)"):
        enable_xattention(other)
    handle.processor.bind(other.transformer, pipeline=other)
    generate(other, 4)
    assert states(handle.processor.report()) == ["dense", "sparse", "sparse", "dense"]
