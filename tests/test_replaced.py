"""A method of one object, replaced for a while."""

from torch import nn

from xattn_video.processors.replaced import replaced


def say(text):
    return lambda: text


def test_the_method_of_the_class_comes_back():
    layer = nn.Linear(2, 2)
    with replaced(layer, "extra_repr", say("other")):
        assert layer.extra_repr() == "other"
    assert "extra_repr" not in vars(layer)


def test_what_the_object_had_comes_back_after_an_error_too():
    layer = nn.Linear(2, 2)
    layer.extra_repr = say("own")
    try:
        with replaced(layer, "extra_repr", say("other")):
            raise KeyError
    except KeyError:
        pass
    assert layer.extra_repr() == "own"


def test_what_another_put_there_stays():
    layer = nn.Linear(2, 2)
    layer.extra_repr = say("own")
    with replaced(layer, "extra_repr", say("other")):
        layer.extra_repr = say("another's")
    assert layer.extra_repr() == "another's"
