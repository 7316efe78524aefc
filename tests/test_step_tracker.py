import dataclasses

import pytest
import torch
from hunyuan import TEXT_TOKENS, forward_inputs, tiny_processor, tiny_transformer

from xattn_video.policy.steps import ForwardInputs, SchedulerStep, StepTracker
from xattn_video.processors.binding import ForwardHook
from xattn_video.processors.families.hunyuan_video import read_forward


def seen(timestep, latents=0.0, dtype=torch.float32, shape=(4, 3, 8, 8), text=0.0):
    """What one forward pass shows of itself."""
    return ForwardInputs(
        timestep=float(torch.tensor(timestep).to(dtype)),
        timestep_dtype=dtype,
        latent_shape=shape,
        latent_sample=(latents,),
        text_sample=(text,),
        text_lengths=(10,),
        text_tokens=16,
        device=torch.device("cpu"),
        dtype=dtype,
        needs_grad=False,
    )


def steps_of(inputs):
    """(step, pass) of each forward pass, and the number of generations."""
    tracker = StepTracker()
    generations, found = 0, []
    for one in inputs:
        generations += tracker.observe(one)
        found.append((tracker.step, tracker.forward_pass))
    return found, generations


def shifted_timesteps(num_steps, shift=7.0):
    """A HunyuanVideo schedule."""
    share = torch.linspace(1, 0, num_steps + 1)[:-1]
    return (1000 * shift * share / (1 + (shift - 1) * share)).tolist()


def pipeline_run(num_steps, dtype, passes=1):
    """A pipeline's forward passes: its first timestep is float32, the others have `dtype`."""
    return [
        seen(timestep, float(number), dtype if number else torch.float32, text=text)
        for number, timestep in enumerate(shifted_timesteps(num_steps))
        for text in range(passes)
    ]


def test_a_lower_timestep_is_the_next_step():
    found, generations = steps_of([seen(1000.0), seen(700.0, 1.0), seen(300.0, 2.0)])
    assert found == [(0, 0), (1, 0), (2, 0)]
    assert generations == 1


def test_the_same_timestep_is_the_same_step():
    steps = [(1000.0, 0.0), (700.0, 1.0)]
    found, _ = steps_of([seen(*step, text=text) for step in steps for text in (0.0, 1.0)])
    assert found == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_higher_timestep_is_a_new_generation():
    found, generations = steps_of([seen(1000.0), seen(300.0, 1.0), seen(1000.0, 2.0)])
    assert found == [(0, 0), (1, 0), (0, 0)]
    assert generations == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_steps", [1, 2, 20, 50, 100, 200])
@pytest.mark.parametrize("passes", [1, 2])
def test_steps_whose_rounded_timesteps_are_equal_are_told_apart(dtype, num_steps, passes):
    """In bfloat16 a 50-step schedule starts 1000, 996, 996, 992."""
    run = pipeline_run(num_steps, dtype, passes)
    found, generations = steps_of(run)
    assert found == [(step, number) for step in range(num_steps) for number in range(passes)]
    assert generations == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ran", [1, 2, 3, 30])
@pytest.mark.parametrize("other_noise", [0.0, 0.5])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_generation_after_an_interrupted_one_starts_at_step_0(dtype, ran, other_noise, passes):
    first = pipeline_run(100, dtype, passes)
    again = [
        dataclasses.replace(one, latent_sample=(one.latent_sample[0] + other_noise,))
        for one in first
    ]
    found, generations = steps_of([*first[: ran * passes], *again])
    expected = [(step, number) for step in range(100) for number in range(passes)]
    assert found == [*expected[: ran * passes], *expected]
    assert generations == 2


def test_rounding_up_is_no_new_generation():
    found, generations = steps_of([seen(994.5), seen(994.2, 1.0, torch.bfloat16)])
    assert float(torch.tensor(994.2).bfloat16()) > 994.5
    assert found == [(0, 0), (1, 0)]
    assert generations == 1


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_latents_in_the_middle_are_no_new_generation(dtype, passes):
    """As a callback can return them; the timestep takes their dtype."""
    timesteps = shifted_timesteps(50)
    expected = [(step, number) for step in range(50) for number in range(passes)]
    for middle in range(1, 50):
        run = pipeline_run(50, dtype, passes)
        for number in range(middle * passes, (middle + 1) * passes):
            text = run[number].text_sample[0]
            run[number] = seen(timesteps[middle], float(middle), torch.float32, text=text)
        assert steps_of(run) == (expected, 1), middle


def test_reset_parts_what_only_the_prompt_tells_apart():
    """A generation that stopped at its first step, then the same noise with another prompt."""
    tracker = StepTracker()
    tracker.observe(seen(1000.0, text=1.0))
    assert not tracker.observe(seen(1000.0, text=2.0))
    assert (tracker.step, tracker.forward_pass) == (0, 1)
    tracker.reset()
    assert tracker.observe(seen(1000.0, text=3.0))
    assert (tracker.step, tracker.forward_pass) == (0, 0)


def test_another_latent_shape_is_a_new_generation():
    found, generations = steps_of([seen(500.0), seen(300.0), seen(200.0, shape=(4, 3, 16, 8))])
    assert found == [(0, 0), (1, 0), (0, 0)]
    assert generations == 2


def test_reset_starts_a_generation():
    tracker = StepTracker()
    for timestep in (900.0, 800.0):
        tracker.observe(seen(timestep))
    tracker.reset()
    assert tracker.step is None
    assert tracker.observe(seen(700.0))
    assert tracker.step == 0


def test_equal_timesteps_with_other_latents_are_the_next_step():
    """Heun's second order runs every timestep but the first twice."""
    run = [seen(1000.0, 0.0), seen(700.0, 1.0), seen(700.0, 2.0), seen(300.0, 3.0)]
    found, generations = steps_of(run)
    assert found == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert generations == 1


def counted(steps):
    """(step, pass) and whether a generation starts, from the scheduler's count and the inputs.

    A third value says whether the pipeline's loop is still in the same iteration.
    """
    tracker, found = StepTracker(), []
    for index, inputs, *same_iteration in steps:
        starts = tracker.observe(inputs, SchedulerStep(index, *same_iteration))
        found.append((tracker.step, tracker.forward_pass, starts))
    return found


def test_the_schedulers_count_is_the_step():
    run = [(None, seen(600.0)), (1, seen(600.0, 1.0)), (2, seen(200.0, 2.0))]
    # The next generation starts below the end of the first.
    run += [(None, seen(100.0, 3.0)), (1, seen(50.0, 4.0))]
    found = counted(run)
    assert found == [(0, 0, True), (1, 0, False), (2, 0, False), (0, 0, True), (1, 0, False)]


@pytest.mark.parametrize("negative", [0.0, 1.0])
def test_the_schedulers_count_and_guidance_are_two_passes_a_step(negative):
    run = [(None, seen(900.0, 0.0), False), (None, seen(900.0, 0.0, text=negative), True)]
    run += [(1, seen(700.0, 1.0, text=text)) for text in (0.0, negative)]
    found = counted(run)
    assert found == [(0, 0, True), (0, 1, False), (1, 0, False), (1, 1, False)]


def test_latents_that_never_change_are_counted_by_the_scheduler():
    """The only latent frame of image-to-video holds the image; its timesteps round to a few."""
    run = [
        (index or None, seen(timestep))
        for index, timestep in enumerate((1000.0,) * 3 + (996.0,) * 3)
    ]
    assert [step for step, _, _ in counted(run)] == list(range(6))


def test_a_generation_that_starts_after_one_step_is_new():
    """The first stopped before its scheduler took a step."""
    for other in ({"latents": 1.0}, {"text": 1.0}, {}):
        found = counted([(None, seen(900.0)), (None, seen(900.0, **other))])
        assert found == [(0, 0, True), (0, 0, True)]


def test_a_scheduler_that_nobody_steps_is_not_believed():
    """After an exception a pipeline looks as if it ran on; here the transformer runs alone."""
    run = [(None, seen(900.0)), (1, seen(700.0, 1.0))]
    run += [(1, seen(500.0, 2.0)), (1, seen(300.0, 3.0)), (1, seen(900.0, 4.0))]
    found = counted(run)
    assert [step for step, _, _ in found] == [0, 1, 2, 3, 0]


def test_the_inputs_are_read_in_one_transfer(monkeypatch):
    transfers = []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda self: transfers.append(self) or to_list(self)
    )
    inputs = read_forward(tiny_transformer(), forward_inputs(500.0, lengths=(10, 3)))
    assert len(transfers) == 1
    assert inputs.timestep == 500.0
    assert inputs.text_lengths == (10, 3)
    assert inputs.text_tokens == TEXT_TOKENS
    assert inputs.latent_shape == (4, 3, 8, 8)


def test_what_tells_steps_apart_is_sampled_where_every_variant_has_it():
    """Image-to-video holds its image in frame 0, and in channels behind the noisy latents."""
    transformer = tiny_transformer()

    def sample(change):
        arguments = forward_inputs(lengths=(16,))
        change(arguments)
        inputs = read_forward(transformer, arguments)
        return inputs.latent_sample, inputs.text_sample

    latents, text = sample(lambda given: None)
    image = sample(lambda given: given["hidden_states"][:, :, 0].zero_())
    assert image == (latents, text)
    condition = sample(lambda given: given["hidden_states"][:, 1:].zero_())
    assert condition == (latents, text)
    noise = sample(lambda given: given["hidden_states"][:, 0, -1].add_(1))
    assert noise[0] != latents
    for token in (0, 7, 15):
        other = sample(lambda given, token=token: given["encoder_hidden_states"][0, token].add_(1))
        assert other[1] != text


def test_positional_arguments_are_read_too():
    transformer = tiny_transformer()
    transformer.set_attn_processor(tiny_processor())
    transformer(*forward_inputs(500.0).values())
    processor = transformer.transformer_blocks[0].attn.processor
    assert processor.report().forwards[0].timestep == 500.0


def test_a_patched_forward_is_read_by_the_names_of_the_class():
    transformer = tiny_transformer()
    original = transformer.forward
    transformer.forward = lambda *args, **kwargs: original(*args, **kwargs)
    transformer.set_attn_processor(tiny_processor())
    arguments = list(forward_inputs(500.0).items())
    transformer(*[value for _, value in arguments[:3]], **dict(arguments[3:]))
    processor = transformer.transformer_blocks[0].attn.processor
    assert processor.report().forwards[0].timestep == 500.0


def test_a_missing_argument_is_named():
    transformer = tiny_transformer()
    transformer.set_attn_processor(tiny_processor())
    with pytest.raises(TypeError, match=r"called with timestep=None; pass a tensor, by name"):
        transformer(**{k: v for k, v in forward_inputs().items() if k != "timestep"})


def test_the_hook_goes_when_no_layer_uses_the_processor():
    transformer = tiny_transformer()
    stock = dict(transformer.attn_processors)
    processor = tiny_processor()
    transformer.set_attn_processor(processor)
    for name, module in transformer.named_modules():
        if f"{name}.processor" in stock:
            module.processor = stock[f"{name}.processor"]
    assert [type(hook) for hook in transformer._forward_pre_hooks.values()] == [ForwardHook]
    transformer(**forward_inputs())
    assert not transformer._forward_pre_hooks
    assert not transformer._forward_pre_hooks_with_kwargs
    assert processor.step_index is None
