"""A pipeline as one file: written, loaded, damaged, on a hub."""

import json
from pathlib import Path

import numpy as np
import pytest
import trained
from click.testing import CliRunner
from safetensors import safe_open
from trained import CLASSES

import ear
from ear.commands.cli import main
from ear.files.tensors import read_tensors, write_tensors
from ear.sampling import portable
from ear.sampling.portable import Pipeline

pytestmark = pytest.mark.usefixtures("one_thread")
DRAW = {"steps": 16, "guidance": 2.0, "temperature": 0.9, "seed": 0}


@pytest.fixture
def exported(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return trained.exported()


def test_the_command_says_how_to_load_what_it_wrote(exported):
    result = CliRunner().invoke(main, ["export", "again.safetensors"])
    assert "`ear.load_pipeline('again.safetensors')` loads it" in result.output
    assert Path("again.safetensors").read_bytes() == exported.read_bytes()


def test_one_file_generates_the_same_images_as_the_repository(exported):
    pipeline = ear.load_pipeline(exported)
    assert pipeline.classes == CLASSES
    assert np.array_equal(pipeline.generate(labels=[3, "7"], **DRAW), ear.generate("data", labels=[3, 7], **DRAW))
    assert np.array_equal(pipeline.generate([7], first=5, **DRAW), ear.generate("data", [7], first=5, **DRAW))
    assert pipeline.metrics == {"FID-1k": 0.25, "class_accuracy": 0.975, "extractor": "ear-classifier"}


def test_its_defaults_are_the_sampling_behind_the_metrics(exported):
    pipeline = ear.load_pipeline(exported)
    assert (pipeline.sampling["guidance"], pipeline.sampling["steps"]) == (2.2, 8)
    how = {name: value for name, value in pipeline.sampling.items() if not name.startswith("guidance_")}
    same = ear.generate("data", labels=[1], seed=4, **how)
    assert np.array_equal(pipeline.generate([1], seed=4), same)


def test_an_absent_device_is_not_called_damage(exported):
    with pytest.raises(ear.UserError, match=r"^device is 'cuda:99', which torch does not find"):
        ear.load_pipeline(exported, "cuda:99")


def test_it_edits_like_the_repository(exported):
    pipeline = ear.load_pipeline(exported)
    images = pipeline.generate([1, 2], **DRAW)
    mask = np.zeros((2, 8, 8), bool)
    mask[:, 2:4, 2:6] = True
    edited = pipeline.inpaint(images, mask, [3, 3], **DRAW)
    assert np.array_equal(edited, ear.inpaint(images, mask, [3, 3], data="data", **DRAW))
    assert np.array_equal(edited[~mask], images[~mask])


def test_figures_of_another_model_are_left_out(exported):
    protocol = json.loads(Path("data/evaluation/protocol.json").read_text())
    protocol["sampling"]["model_sha256"] = "of another model"
    Path("data/evaluation/protocol.json").write_text(json.dumps(protocol))
    result = CliRunner().invoke(main, ["export", "other.safetensors"])
    assert "without metrics: the evaluation of this model has not run" in result.output
    assert ear.load_pipeline("other.safetensors").metrics == {}


def test_writing_it_again_gives_the_same_bytes(exported, tmp_path):
    again = tmp_path / "again.safetensors"
    ear.load_pipeline(exported).save(again)
    assert again.read_bytes() == exported.read_bytes()


def test_it_goes_to_a_folder_or_hub_with_a_model_card_and_back(exported, tmp_path):
    pipeline = ear.load_pipeline(exported)
    folder = tmp_path / "published"
    pipeline.save_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: ear\n")
    assert "| FID-1k | 0.25 |" in card
    again = Pipeline.from_pretrained(str(folder))
    assert np.array_equal(again.generate([5], **DRAW), pipeline.generate([5], **DRAW))


def test_a_name_of_a_hub_is_downloaded(exported, monkeypatch):
    asked = []

    def download(*arguments, **options):
        asked.append((arguments, options))
        return str(exported)

    monkeypatch.setattr(portable, "hf_hub_download", download)
    again = Pipeline._from_pretrained(model_id="you/digits", revision="v1", token=None)
    assert asked == [(("you/digits", "pipeline.safetensors"), {"revision": "v1"})]
    assert np.array_equal(again.generate([5], **DRAW), ear.load_pipeline(exported).generate([5], **DRAW))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda tensors, about: about["sampling"].pop("guidance"), "is not a readable description of a pipeline"),
        (lambda tensors, about: about.update(format="other"), "has format 'other', but must have 'ear-pipeline-1'"),
        (lambda tensors, about: about.pop("tokenizer"), "is not a readable description of a pipeline"),
        (lambda tensors, about: tensors.pop("model.null_class"), "lacks null_class"),
    ],
)
def test_damaged_and_foreign_files_are_one_sentence(exported, damage, said):
    tensors, about = read_tensors(exported)
    damage(tensors, about)
    write_tensors(exported, tensors, about)
    with pytest.raises(ear.UserError) as told:
        ear.load_pipeline(exported)
    assert said in str(told.value)
    assert str(exported) in str(told.value)


def test_a_truncated_file_is_one_sentence(exported):
    exported.write_bytes(exported.read_bytes()[:-100])
    with pytest.raises(ear.UserError, match=str(exported)):
        ear.load_pipeline(exported)


def test_the_file_is_plain_safetensors(exported):
    with safe_open(exported, framework="np") as file:
        assert {name.partition(".")[0] for name in file.keys()} == {"model"}  # noqa: SIM118
