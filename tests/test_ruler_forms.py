"""The forms that the small language model learns are those of lm-evaluation-harness."""

import random
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from xattn_video.language.needle import needle_prompt
from xattn_video.options.prefill_options import DEMO_NEEDLE

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from language_training import forms, sequences

HEX = "[0-9a-f]"


class Words:
    """A tokenizer that counts words."""

    def __call__(self, text):
        self.input_ids = text.split()
        return self


def shape(text):
    """The lines of a text without what is random in them."""
    text = re.sub(f"{HEX}{{8}}-(?:{HEX}{{4}}-){{3}}{HEX}{{12}}", "KEY", text)
    text = re.sub(r"for [\w' -]+-[\w' -]+?(?= is:| mentioned|,)", "for KEY", text)
    text = re.sub(r"(, and |, )[\w' -]+-[\w' -]+?(?= mentioned|,)", r"\1KEY", text)
    return set(re.sub(r"\d+", "0", text).split("\n"))


def ours(form, room=1400):
    pieces = form(room)
    first = next(index for index, piece in enumerate(pieces) if piece.is_answer)
    return "".join(piece.text for piece in pieces[:first])


def needles(haystack, key, value, **numbers):
    prepare = pytest.importorskip("lm_eval.tasks.ruler.prepare_niah")
    utils = pytest.importorskip("lm_eval.tasks.ruler.niah_utils")
    sample = prepare.generate_samples(
        prepare.get_haystack(haystack),
        Words(),
        max_seq_length=600,
        type_haystack=haystack,
        type_needle_k=key,
        type_needle_v=value,
        template=utils.TEMPLATE,
        num_samples=1,
        **numbers,
    )[0]
    return f"{sample['input']} {sample['gen_prefix']}"


@pytest.mark.parametrize(
    ("form", "given"),
    [
        (forms.many_keys, ("needle", "words", "numbers")),
        (forms.many_uuids, ("needle", "uuids", "uuids")),
    ],
)
def test_many_keys(form, given):
    assert shape(ours(form)) == shape(needles(*given))


def test_a_number_that_prefill_hides_is_asked_for_in_the_same_words(tmp_path):
    random.seed(0)
    sequences.train_tokenizer(tmp_path, 20)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = needle_prompt(tokenizer, 1000, DEMO_NEEDLE, 0.5)[0]
    text = tokenizer.decode(tokens)
    # The last sentence of filler is cut, so that the prompt has the asked length.
    lines = [line for line in text.split("\n") if not line or line not in forms.GRASS[:-1]]
    assert shape("\n".join(lines)) == shape(needles("repeat", "words", "numbers"))
    assert tokenizer(text)["input_ids"] == tokens.tolist()


@pytest.mark.parametrize(
    ("form", "numbers"),
    [
        (forms.one_key, {}),
        (forms.several_values, {"num_needle_v": 4}),
        (forms.several_keys, {"num_needle_q": 4}),
    ],
)
def test_few_keys(form, numbers):
    expected = shape(needles("repeat", "words", "numbers", **numbers))
    random.seed(0)
    assert any(shape(ours(form)) == expected for _ in range(200))


@pytest.mark.parametrize("room", [300, 1000, 8192])
def test_a_question_asks_for_all_values_of_its_key(room):
    random.seed(0)
    for _ in range(10):
        pieces = forms.several_values(room)
        text = "".join(piece.text for piece in pieces if not piece.is_answer)
        for question, answer in pairwise(pieces):
            if answer.is_answer:
                (key,) = re.findall(
                    r"for (\S[^?\n]*?) mentioned in the provided text (?:is|are)$", question.text
                )
                values = re.findall(rf"for {re.escape(key)} is: (\d+)", text)
                assert sorted(re.findall(r"\d+", answer.text)) == sorted(values)
                assert answer.any_order == (len(values) > 1)
                assert len(values) == min(4, room // 100)


def test_most_of_the_shortest_texts_need_their_keys():
    random.seed(0)
    texts = (forms.random_form(sequences._SHORTEST_FORM) for _ in range(200))
    needles = ["".join(piece.text for piece in text).count("One of the special") for text in texts]
    assert sum(count > 2 for count in needles) > 120


def test_pieces_encode_as_the_whole_text_does(tmp_path):
    random.seed(0)
    sequences.train_tokenizer(tmp_path, 20)
    encoder = sequences.Encoder(tmp_path)
    needed = {form: least for form, (_, least) in forms.FORMS.items()}
    for form, least in {**needed, forms.copied_needles: 64}.items():
        pieces = form(max(512, least))
        ids, answers, others = encoder.encode(pieces)
        whole = encoder._tokenizer.encode("".join(piece.text for piece in pieces)).ids
        assert [token for token in ids if token != sequences.END] == whole
        assert any(answers)
        assert bool(others) == (form is forms.several_values)


def test_a_repeated_string_is_known_from_its_second_time():
    random.seed(0)
    for _ in range(20):
        ids, known, _ = sequences.repeated(64)
        half = len(ids) // 2
        assert not any(known[:half])
        assert sorted(ids[:half]) == sorted(ids[half:])


def test_copied_needles_are_the_same_lines_twice():
    text = "".join(piece.text for piece in forms.copied_needles(500))
    lines = text.splitlines()
    half = len(lines) // 2
    assert half == 10
    assert sorted(lines[:half]) == sorted(lines[half:])
