"""The page that shows a run: what it says, and what it does in a real browser."""

import json
import re

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from firefox import FIREFOX, Firefox

from xattn_video.measure.clips import Clip
from xattn_video.measure.page_players import compared_player, single_player
from xattn_video.reporting.tables import Table
from xattn_video.reporting.web_page import Curve, Figure, HeatMap, WebPage, round_limits

FRAMES = 9
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; apt install it")
needs_firefox = pytest.mark.skipif(FIREFOX is None, reason="needs Firefox; apt install it")
BOTH = [
    pytest.param("browser", marks=needs_chromium, id="chromium"),
    pytest.param("firefox", marks=needs_firefox, id="firefox"),
]


def grey_clip(first: int, size: int = 64) -> Clip:
    """Frame i is ``first + 10 * i`` all over."""
    frames = np.full((FRAMES, size, size, 3), first, np.uint8)
    frames += (10 * np.arange(FRAMES, dtype=np.uint8))[:, None, None, None]
    return Clip(frames, fps=24)


def density(layer: int, step: int) -> float | str:
    return "dense, warm-up" if step < 5 else 0.2 + 0.01 * step + 0.001 * layer


@pytest.fixture(scope="module")
def page() -> WebPage:
    """Everything that a page can show, as large as HunyuanVideo's."""
    settings = ("tau 0.9, warm-up 5, stride 8", "tau 0.5, warm-up 5, stride 8")
    players = (
        compared_player("first prompt", grey_clip(40), settings[0], grey_clip(60)),
        compared_player("second prompt", grey_clip(40), settings[1], grey_clip(40)),
    )
    maps = tuple(
        HeatMap(name, [[density(layer, step) for step in range(50)] for layer in range(60)])
        for name in settings
    )
    names = tuple(f"a rather long heading {number}" for number in range(12))
    return WebPage(
        title="A title that is long enough to need two lines on a telephone",
        lead="demo, 64x64 <b>&amp;</b> " + "a" * 90,
        figures=(Figure("46.8 dB", "PSNR against dense", "a note"),) * 3,
        players=players,
        heat_maps=maps,
        tables=(("Measured", Table(names, (names,) * 2)),),
        facts=(("Settings", {"threshold": "0.9"}), ("What ran", {"device": "cpu " * 20})),
        notes=("A note </script><script>console.error('escaped')</script>",),
        command="xattn-video demo --prompt 'a <red> circle'",
    )


@pytest.fixture(scope="module")
def page_file(tmp_path_factory, page):
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(page.html())
    return file


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = Browser(tmp_path_factory.mktemp("browser") / "profile")
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def firefox(tmp_path_factory):
    started = Firefox(tmp_path_factory.mktemp("firefox") / "profile")
    yield started
    started.close()


def open_afresh(browser, page_file):
    """The page, its first frame drawn."""
    browser.size(1280)
    browser.open(page_file)
    browser.wait("document.querySelector('.player').dataset.drawn === '0'")
    return browser


@pytest.fixture
def opened(browser, page_file):
    """The page in Chromium."""
    return open_afresh(browser, page_file)


@pytest.fixture(params=BOTH)
def either(request, page_file):
    """The page in Chromium, then in Firefox."""
    return open_afresh(request.getfixturevalue(request.param), page_file)


# From copies: Chromium complains of canvases that are drawn and read.
GREYS = """[...document.querySelectorAll('.player:not([hidden]) canvas')].map((canvas) => {
    const copy = new OffscreenCanvas(64, 64).getContext('2d', { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    return copy.getImageData(32, 32, 1, 1).data[0];
})"""


def assert_frame(browser: Browser, frame: int) -> None:
    """All three pictures, the number and the curves show it."""
    browser.wait(f"document.querySelector('.player').dataset.drawn === '{frame}'")
    dense, sparse, difference = browser.run(GREYS)
    assert dense == pytest.approx(40 + 10 * frame, abs=4)
    assert sparse == pytest.approx(60 + 10 * frame, abs=4)
    assert difference == pytest.approx(80, abs=4)
    assert browser.run("document.querySelector('.position').textContent") == f"{frame + 1} / 9"
    cursor = browser.run("Number(document.querySelector('.cursor').getAttribute('x1'))")
    assert cursor == pytest.approx(1000 * frame / 8)


def test_the_slider_moves_all_three(either):
    assert_frame(either, 0)
    for frame in (5, 8, 2):
        either.run(
            "{ const slider = document.querySelector('input[type=range]');"
            f"slider.value = {frame}; slider.dispatchEvent(new Event('input')) }}"
        )
        assert_frame(either, frame)
    assert either.complaints == []


def test_the_keyboard_goes_frame_by_frame(either):
    either.run("document.querySelector('input[type=range]').focus()")
    for key, frame in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 8)):
        either.press(key)
        assert_frame(either, frame)
    either.press("Home")
    assert_frame(either, 0)


def test_it_plays_and_pauses(either):
    either.run("document.querySelector('.play').click()")
    either.wait("Number(document.querySelector('.player').dataset.drawn) >= 3")
    assert either.run("document.querySelector('.play').ariaLabel") == "Pause"
    either.press(" ")
    either.run("document.querySelector('input[type=range]').focus()")
    if either.run("document.querySelector('.play').ariaLabel") == "Pause":
        either.press(" ")
    either.wait("document.querySelector('.play').ariaLabel === 'Play'")
    # Paused, it stands at the frame that it names.
    frame = either.run("Number(document.querySelector('input[type=range]').value)")
    either.wait("!document.querySelector('video').seeking")
    assert_frame(either, frame)
    assert either.complaints == []


def test_a_list_chooses_the_video(either):
    either.run(
        "{ const list = document.querySelector('[data-chooses=player]'); list.value = '1';"
        "list.dispatchEvent(new Event('change')) }"
    )
    either.wait("document.querySelectorAll('.player')[1].dataset.drawn === '0'")
    assert either.run(GREYS) == pytest.approx([40, 40, 0], abs=4)
    shown = either.run("document.querySelector('.player:not([hidden]) .curve output').textContent")
    assert shown == "identical"


@needs_chromium
def test_the_heat_map_tells_its_numbers(opened):
    opened.run("document.querySelector('.map td').focus()")
    tip = "document.querySelector('.tip').textContent"
    assert opened.run(tip) == "Step 0, layer 0: dense, warm-up"
    opened.press("End")
    opened.press("ArrowDown")
    assert opened.run(tip) == "Step 49, layer 1: density 0.691"
    box = opened.run(
        "{ const box = document.querySelectorAll('.map tr')[3].cells[8].getBoundingClientRect();"
        "[box.x + 2, box.y + 2] }"
    )
    opened.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    assert opened.run(tip) == "Step 7, layer 2: density 0.272"
    assert opened.run("document.querySelector('.tip').hidden") is False


@needs_chromium
@pytest.mark.parametrize("width", [400, 800, 1280])
def test_nothing_is_wider_than_the_window(width, opened):
    opened.size(width)
    assert opened.run("document.documentElement.scrollWidth") <= width
    outside = opened.run(
        "[...document.querySelectorAll('main *')].filter((part) => !part.closest('.wide, .hidden')"
        " && part.getBoundingClientRect().right > innerWidth + 1).map((part) => part.outerHTML)"
    )
    assert outside == []
    pictures = "[...document.querySelectorAll('.player:not([hidden]) canvas')]"
    widths = opened.run(f"{pictures}.map((canvas) => canvas.getBoundingClientRect().width)")
    assert max(widths) - min(widths) < 1


@needs_chromium
def test_light_and_dark(opened):
    colours = {}
    for scheme in ("light", "dark"):
        opened.scheme(scheme)
        colours[scheme] = opened.run("getComputedStyle(document.body).backgroundColor")
    assert colours["light"] != colours["dark"]


@needs_chromium
def test_a_screen_reader_is_told_everything(opened):
    nodes = opened.call("Accessibility.getFullAXTree")["nodes"]
    named = {
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"]
    }
    assert {
        ("slider", "Frame"),
        ("button", "Play"),
        ("button", "Copy"),
        ("image", "dense"),
        ("grid", "Density by layer and step, tau 0.9, warm-up 5, stride 8"),
        ("gridcell", "Step 7, layer 2: density 0.272"),
    } <= named
    assert any(name.startswith("PSNR by frame: mean 22.1 dB, lowest 22.1 dB") for _, name in named)
    assert all(name for role, name in named if role in ("button", "slider", "combobox"))
    value = opened.run("document.querySelector('input[type=range]').ariaValueText")
    assert value.startswith("frame 1 of 9, PSNR 22.1 dB, SSIM 0.")


@needs_chromium
def test_the_command_is_copied(opened):
    opened.call("Browser.grantPermissions", permissions=["clipboardReadWrite"])
    opened.run("document.querySelector('.copy').click()")
    opened.wait("document.querySelector('.copy').textContent === 'Copied'")
    copied = opened.run("navigator.clipboard.readText()")
    assert copied == "xattn-video demo --prompt 'a <red> circle'"


def test_it_needs_no_other_file(page):
    text = page.html()
    sources = re.findall(r"(?:src|href)=\"([^\"]{0,40})", text)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert "http://" not in text
    assert "https://" not in text


def test_text_is_never_markup(page):
    text = page.html()
    assert "&lt;b&gt;&amp;amp;&lt;/b&gt;" in text
    assert "a &lt;red&gt; circle" in text
    assert text.count("<script>") == 2


def test_what_is_empty_is_left_out():
    text = WebPage("title", "lead").html()
    assert "<section" not in text
    assert "<ul" not in text


def test_its_text_is_markdown_too():
    table = Table(("task", "score"), (("one", "0.5"),))
    page = WebPage("title", "lead", tables=(("Measured", table),), notes=("read this",))
    expected = ["# title", "lead", f"## Measured\n\n{table.markdown()}", "- read this\n"]
    assert page.markdown() == "\n\n".join(expected)
    assert WebPage("title", "lead").markdown() == "# title\n\nlead\n"


def test_a_large_video_is_reduced_and_an_odd_one_made_even():
    frames = np.zeros((2, 721, 1281, 3), np.uint8)
    player = single_player("one", "sparse", Clip(frames, fps=24))
    assert (player.width, player.height) == (480, 270)
    assert player.labels == ("sparse",)


@pytest.mark.parametrize(
    ("low", "high", "digits", "limits"),
    [
        (38.2, 46.7, 1, (38, 47)),
        (0.9962, 0.9979, 4, (0.996, 0.998)),
        (22.1, 22.1, 1, (22.1, 22.2)),
        (30, 50, 1, (30, 50)),
    ],
)
def test_axes_show_differences(low, high, digits, limits):
    assert round_limits(low, high, digits) == pytest.approx(limits)


def test_identical_frames_do_not_stretch_the_axis():
    curve = Curve("PSNR", "dB", (100.0, 41.3, 44.0), digits=1, cap=100.0)
    assert curve.limits == pytest.approx((41, 44))
    assert curve.points.split()[0] == "0.0,0.0"
    assert curve.texts[0] == "identical"
    assert json.dumps(curve.summary) == '"PSNR by frame: mean 61.8 dB, lowest 41.3 dB at frame 2"'


def test_a_heat_map_spreads_its_colours_over_what_is_there():
    shown = HeatMap("one", [["dense", 0.63, 0.71]])
    assert shown.limits == pytest.approx((0.6, 0.8))
    assert shown.shaded == [
        [
            (None, "dense"),
            (pytest.approx(0.15), "density 0.630"),
            (pytest.approx(0.55), "density 0.710"),
        ]
    ]
    assert HeatMap("one", [["dense"]]).limits == (0, 1)
    assert HeatMap("one", [[1.0]]).limits == (0.9, 1.0)


def test_a_table_turned():
    table = Table(("setting", "PSNR", "SSIM"), (("dense", "", ""), ("tau 0.9", "41", "0.99")))
    assert table.turned() == Table(
        ("setting", "dense", "tau 0.9"), (("PSNR", "", "41"), ("SSIM", "", "0.99"))
    )
