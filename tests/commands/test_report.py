"""`ear report` on the outputs of a real pipeline, opened in a browser."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from browser import browser_page, needs_browser
from prepared_sets import pixels, write_prepared

from ear.commands import report
from ear.commands.report import parts
from ear.data.preparation import _write_rejected
from ear.display.live import FOLDER, Live
from ear.files.json_files import write_json
from ear.sampling import samples

ROOT = Path(__file__).parents[2]


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """Prepared and generated images, and a training that runs."""
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    images = pixels(60)
    write_prepared(tmp_path / "data/prepared", images, (40,), 20)
    _write_rejected(Path("data/prepared/rejected.csv"), [("two\nlines\udcff.png", "truncated")])
    classes = report.parts.PreparedImages("data/prepared", "train").classes
    path = Path("data/samples/samples.h5")
    path.parent.mkdir()
    labels = [k % len(classes) for k in range(30)]
    samples.create(path, labels=labels, image_shape=images.shape[1:], sampling={"seed": 0, "classes": list(classes)})
    samples.write(path, 0, images[:30])  # copies of training images
    live = Live(FOLDER / "train")
    live.begin(0, {"total_images": 640})
    for number in range(1, 5):
        live.training({"images": 64 * number, "loss": 3.0 - number, "attraction": 4.0, "repulsion": 2.0})
    return tmp_path


def test_copies_of_training_images_are_noticed(repository):
    part = parts.nearest()
    (_, *generated), (_, *real) = part.tables[0].rows
    assert {float(value) for value in generated} == {0.0}
    assert all(float(value) > 0.05 for value in real)


def test_distances_are_those_of_the_nearest_image(monkeypatch):
    random = np.random.default_rng(0)
    images, searched = (random.integers(0, 256, (n, 4, 4, 3), np.uint8) for n in (5, 7))
    brute = np.sqrt(((images[:, None] / 255.0 - searched[None] / 255.0) ** 2).mean((2, 3, 4)))

    class Source:
        def images(self, rows):
            return searched[rows]

    for memory in (1e9, 400):  # in one part, in parts of 2
        monkeypatch.setattr(parts, "_BYTES", memory)
        distances, places = parts._nearest(images, Source(), 7)
        np.testing.assert_allclose(distances, brute.min(1), rtol=1e-4)
        assert (places == brute.argmin(1)).all()


def test_a_class_whose_name_is_not_utf8_is_in_the_page(repository):
    write_json(Path("data/prepared/classes.json"), {"classes": ["a", "b", "caf\udce9"]})
    assert report.run().startswith("wrote data/report.html")
    assert r"caf\udce9" in Path("data/report.html").read_text()


def test_files_of_other_runs_side_by_side_leave_the_other_parts(repository):
    shutil.rmtree("data/prepared")
    write_prepared(repository / "data/prepared", pixels(60, 16), (40,), 20)  # other sizes than the samples
    said = report.run()
    assert "Real and generated images, Nearest training images" in said
    assert "Training" not in said


@needs_browser
def test_a_report_of_a_pipeline_that_has_not_finished_shows_what_there_is(repository):
    said = report.run()
    assert said.startswith("wrote data/report.html")
    assert said.endswith("missing: Metrics, Reconstructions by the tokenizer, Latents")
    with browser_page() as (page, left):
        page.goto((repository / "data/report.html").as_uri())
        assert page.title() == "ear report"
        assert "unreadable and left out: 1." in page.locator("#part-7").inner_text()
        titles = page.locator("h2").all_text_contents()
        assert titles[:3] == ["Metrics", "Real and generated images", "Nearest training images"]
        missing = page.locator(".missing").all_text_contents()
        assert missing[0].startswith("Missing: data/evaluation/metrics.json does not exist; run the stage")
        assert "train (running or stopped)" in page.locator("figcaption").all_text_contents()
        broken = page.evaluate("[...document.images].filter(i => !i.naturalWidth).length")
        assert (page.locator("img").count() > 3, broken, left) == (True, 0, [])
        assert page.locator("summary").filter(has_text="key, value").count() == 1
