"""`ear playground` in a real browser: a click gives images, a brush stroke is redrawn."""

import socket

import numpy as np
import pytest
import trained
from browser import browser_page, needs_browser
from PIL import Image

import ear
from ear.commands import playground

gradio = pytest.importorskip("gradio")


@pytest.fixture
def exported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return trained.exported()


@pytest.fixture
def address(exported):
    """Of a page that serves the exported pipeline."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    blocks = playground.page(ear.load_pipeline(exported))
    blocks.launch(server_name="127.0.0.1", server_port=port, share=False, quiet=True, prevent_thread_lock=True)
    yield f"http://127.0.0.1:{port}"
    blocks.close()


def test_tokens_appear_step_by_step_and_the_last_picture_is_what_generate_draws(exported):
    pipeline = ear.load_pipeline(exported)
    states = list(playground.generated(pipeline, "3", 4, 2.0, 0.9, 5, 7))
    assert [text for _, text in states] == [*(f"snapshot {k} of 5" for k in range(5)), "4 images, seed 7"]
    images = pipeline.sampler.step_by_step(
        [3] * 4, pipeline.settings(7, steps=5, guidance=2.0, temperature=0.9), first=0
    )
    expected = pipeline.generate([3] * 4, steps=5, guidance=2.0, temperature=0.9, seed=7)
    assert np.array_equal(images[-1], expected)
    unknown = [int((state == images[0]).all(-1).sum()) for state in images]
    assert unknown == sorted(unknown, reverse=True)  # fewer pixels of tokens that are not drawn yet


def test_a_stroke_covers_the_pixels_that_are_half_painted(exported):
    pipeline = ear.load_pipeline(exported)
    picture = playground.first_image(pipeline)
    scale = picture.shape[0] // 8
    layer = np.zeros((*picture.shape[:2], 4), np.uint8)
    layer[: int(2.6 * scale), : int(1.4 * scale), 3] = 255
    image, mask = playground.small(pipeline, picture, [layer])
    assert image.shape == (8, 8, 3)
    assert np.argwhere(mask).tolist() == [[0, 0], [1, 0], [2, 0]]
    nothing, said = playground.inpainted(pipeline, {"background": picture, "layers": []}, "3", 2.0, 1.0, 4, 0)
    assert nothing is None
    assert said.startswith("Nothing is painted over")


@needs_browser
def test_a_click_gives_images_and_a_stroke_is_redrawn(address, tmp_path):
    with browser_page() as (page, left):
        page.goto(address)
        page.locator("#generate").click()
        page.wait_for_function("document.querySelector('#said').innerText.includes('images, seed')", timeout=60_000)
        with page.expect_download() as download:
            page.locator("#generated button[title='Download'], #generated a[download]").first.click()
        download.value.save_as(tmp_path / "images.png")
        assert Image.open(tmp_path / "images.png").size[0] > 500
        page.get_by_role("tab", name="Inpaint").click()
        canvas = page.locator("#painted canvas").first
        canvas.wait_for()
        page.wait_for_timeout(1500)  # until the editor has placed its image
        box = canvas.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x - 30, y)
        page.mouse.down()
        page.mouse.move(x + 30, y, steps=10)
        page.mouse.up()
        page.wait_for_timeout(500)
        page.locator("#redraw").click()
        page.wait_for_function("document.querySelector('#told').innerText.includes('redrawn as')", timeout=60_000)
        assert left == []
