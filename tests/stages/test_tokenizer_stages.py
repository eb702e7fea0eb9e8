"""The tokenizer and the cache stage as a user runs them, in a repository of their own."""

import importlib
import shutil
from pathlib import Path

import numpy as np
import one_stage
import processes
import pytest
import torch
from diffusers import AutoencoderKL
from omegaconf import OmegaConf
from PIL import Image
from prepared_sets import pixels, write_prepared

from ear import config
from ear.files.digests import sha256
from ear.files.json_files import read_json, rounded
from ear.files.tensors import read_tensors
from ear.latents.store import LatentStore
from ear.tokenizer.autoencoder import load_tokenizer
from ear.tokenizer.critic import CriticTraining
from stages import program

ROOT = Path(__file__).parents[2]
LENGTHS, VAL = (20, 20, 8), 16
TINY = {
    "compute.threads": 1,
    "runtime.device": "cpu",
    "data.image_size": 8,
    "tokenizer.downsample": 2,
    "tokenizer.channels": 3,
    "tokenizer.block_channels": [8, 16],
    "tokenizer.images": 960,
    "tokenizer.batch_size": 16,
    "tokenizer.micro_batch_size": 16,
    "cache.batch_size": 8,
}


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A folder that stages run in, with 48 training and 16 held-out images: smooth random ones of 8 x 8 pixels."""
    for name in ("ear", "stages", "dvc.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    small = pixels(sum(LENGTHS) + VAL, size=2)
    images = [np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BICUBIC)) for image in small]
    write_prepared(tmp_path / "data/prepared", np.stack(images), LENGTHS, VAL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def set_parameters(**changes) -> None:
    """Write params.yaml: the default, made tiny."""
    content = OmegaConf.load(ROOT / "params.yaml")
    for key, value in {**TINY, **changes}.items():
        OmegaConf.update(content, key, value)
    OmegaConf.save(content, "params.yaml")


def run(stage: str, **changes) -> None:
    """One stage in this process."""
    torch.set_num_threads(1)
    set_parameters(**changes)
    module = importlib.import_module(f"stages.{stage}")
    program.perform(stage, module.work, module.Parameters, config.load)


def contents(folder: str) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(Path(folder).iterdir())}


def kill_once(stage: str, pattern: str, count: int = 2) -> None:
    """Start the stage, and kill it as soon as its scratch folder holds so many files of this pattern."""
    processes.kill(lambda: one_stage.main(stage), lambda: len(list(Path("work", stage).glob(f"*/{pattern}"))) >= count)


def test_tokenizer_learns_and_describes_itself(repository):
    run("tokenizer", **{"tokenizer.images": 9600, "tokenizer.learning_rate": 4e-3})
    assert set(contents("data/tokenizer")) == {
        "channels.tsv",
        "tokenizer.safetensors",
        "metrics.json",
        "training.tsv",
        "validation.tsv",
        "reconstructions.png",
    }
    figures = read_json("data/tokenizer/metrics.json")
    assert figures == rounded(figures)  # no more digits than every machine gives
    assert figures["psnr"] > 14  # images of one colour, their mean, would have about 12 dB
    assert figures["psnr"] > figures["psnr_sampled"] - 1
    header, *rows = Path("data/tokenizer/channels.tsv").read_text().splitlines()
    assert header.split("\t") == ["channel", "mean", "std", "posterior_std"]
    assert [row.split("\t")[0] for row in rows] == ["0", "1", "2"]
    tokenizer = load_tokenizer("data/tokenizer/tokenizer.safetensors")
    assert figures["parameters"] == sum(p.numel() for p in tokenizer.parameters())
    header, *rows = Path("data/tokenizer/validation.tsv").read_text().splitlines()
    assert header.split("\t") == ["images", "loss", "reconstruction", "kl"]
    losses = [float(row.split("\t")[1]) for row in rows]
    assert len(rows) == 10
    assert losses[-1] < 0.7 * losses[0]
    with Image.open("data/tokenizer/reconstructions.png") as picture:
        scale = 64 // 8
        assert picture.size == (12 * (8 * scale + 2) + 2, 2 * (8 * scale + 2) + 2)


def test_killed_tokenizer_training_ends_in_the_same_bytes(repository):
    run("tokenizer")
    whole = contents("data/tokenizer")
    shutil.rmtree("data/tokenizer")
    shutil.rmtree("work")
    kill_once("tokenizer", "checkpoint-*.safetensors")
    assert not Path("data/tokenizer").exists()
    newest = max(Path("work/tokenizer").glob("*/checkpoint-*.safetensors")).name
    assert newest < "checkpoint-000000000960.safetensors"
    run("tokenizer")
    assert contents("data/tokenizer") == whole


def test_changed_parameters_start_afresh(repository, capsys):
    run("tokenizer", **{"tokenizer.images": 32})
    first = contents("data/tokenizer")
    run("tokenizer", **{"tokenizer.images": 32, "tokenizer.seed": 1})
    assert "resuming" not in capsys.readouterr().out
    assert contents("data/tokenizer")["tokenizer.safetensors"] != first["tokenizer.safetensors"]


def test_principal_components_need_no_training(repository):
    found = {}
    for channels in (3, 9, 12):
        run("tokenizer", **{"tokenizer.name": "pca", "tokenizer.channels": channels, "tokenizer.whitening": 0.5})
        found[channels] = read_json("data/tokenizer/metrics.json")["psnr"]
    assert found[3] < found[9] < found[12] == 100.0


def test_identity_needs_no_training_and_loses_nothing(repository):
    run("tokenizer", **{"tokenizer.name": "identity"})
    figures = read_json("data/tokenizer/metrics.json")
    assert figures["psnr"] == figures["psnr_sampled"] == 100
    assert figures["parameters"] == 0
    run("cache")
    assert LatentStore("data/latents", "train").shape == (12, 4, 4)


def save_vae() -> None:
    """An autoencoder of diffusers in the folder vae: sides halved once, 3 latent channels."""
    structure = {"block_out_channels": (8, 16), "latent_channels": 3, "norm_num_groups": 2}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(**structure, **blocks).save_pretrained("vae")


def test_imported_tokenizer_is_described_and_caches(repository):
    save_vae()
    run("tokenizer", **{"tokenizer.name": "diffusers", "tokenizer.weights": "vae"})
    source = read_tensors("data/tokenizer/tokenizer.safetensors")[1]["source"]
    assert source["sha256"] == sha256("vae/diffusion_pytorch_model.safetensors")
    assert read_json("data/tokenizer/metrics.json")["psnr"] < 20  # its weights are random
    header, row = Path("data/tokenizer/validation.tsv").read_text().splitlines()
    assert header.split("\t") == ["images", "loss", "reconstruction", "kl"]
    assert float(row.split("\t")[2]) > 0.1
    run("cache")
    assert LatentStore("data/latents", "train").shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.downsample": 4}, r"tokenizer\.downsample is 4, but the autoencoder of vae has 2; set .* to 2"),
        ({"tokenizer.channels": 4}, r"tokenizer\.channels is 4, but the autoencoder of vae has 3; set .* to 3"),
    ],
)
def test_parameters_that_contradict_the_imported_file_are_refused(repository, changes, message):
    save_vae()
    with pytest.raises(ValueError, match=message):
        run("tokenizer", **{"tokenizer.name": "diffusers", "tokenizer.weights": "vae", **changes})
    assert not Path("data/tokenizer").exists()


def test_perceptual_distance_is_trained_and_logged(repository, perceptual_folder):
    write_prepared(repository / "data/prepared", pixels(64, size=16), LENGTHS, VAL)
    options = {"data.image_size": 16, "tokenizer.perceptual_weight": 1.0, "tokenizer.images": 32}
    run("tokenizer", **options, **{"tokenizer.perceptual_folder": str(perceptual_folder)})
    header, first, *_ = Path("data/tokenizer/training.tsv").read_text().splitlines()
    row = dict(zip(header.split("\t"), map(float, first.split("\t")), strict=True))
    assert row["perceptual"] > 0.1
    assert row["loss"] == pytest.approx(row["reconstruction"] + row["perceptual"], rel=1e-3)


CRITICAL = {
    "data.image_size": 24,
    "tokenizer.adversarial_weight": 0.5,
    "tokenizer.adversarial_start": 64,
    "tokenizer.images": 112,
}


@pytest.mark.parametrize("micro_batch_size", [pytest.param(16, marks=pytest.mark.slow), 8])
def test_stopped_training_with_a_critic_ends_in_the_same_bytes(repository, monkeypatch, micro_batch_size):
    monkeypatch.setitem(CRITICAL, "tokenizer.micro_batch_size", micro_batch_size)
    write_prepared(repository / "data/prepared", pixels(64, size=24), LENGTHS, VAL)
    run("tokenizer", **CRITICAL)
    whole = contents("data/tokenizer")
    header, *rows = Path("data/tokenizer/training.tsv").read_text().splitlines()
    weights = [float(row.split("\t")[header.split("\t").index("adversarial_weight")]) for row in rows]
    assert weights[-1] > 0
    shutil.rmtree("data/tokenizer")
    shutil.rmtree("work")

    calls, judge = [], CriticTraining.__call__

    def stopping(critic, *arguments):
        calls.append(arguments[-1])
        if len(calls) == 6 * 16 // micro_batch_size:  # of 7 steps: after the first one in which the critic is heard
            raise KeyboardInterrupt
        return judge(critic, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CriticTraining, "__call__", stopping)
        with pytest.raises(KeyboardInterrupt):
            run("tokenizer", **CRITICAL)
    run("tokenizer", **CRITICAL)
    assert contents("data/tokenizer") == whole


def test_images_of_another_size_than_asked_for_are_refused(repository):
    with pytest.raises(ValueError, match=r"have 8 pixels a side, but data\.image_size is 16; run the prepare stage"):
        run("tokenizer", **{"data.image_size": 16, "model.patch_size": 1})
    assert not Path("data/tokenizer").exists()


@pytest.fixture
def with_tokenizer(repository) -> Path:
    run("tokenizer", **{"tokenizer.images": 16})
    return repository


def test_killed_cache_ends_in_the_same_bytes(with_tokenizer):
    run("cache", **{"cache.batch_size": 1})
    whole = contents("data/latents")
    assert set(whole) == {"train-00000-of-00001.h5", "val-00000-of-00001.h5", "stats.json"}
    shutil.rmtree("data/latents")
    shutil.rmtree("work")
    kill_once("cache", "*.h5-*.json", count=1)  # the note of a finished piece
    assert not Path("data/latents").exists()
    kept = {path.name: path.stat().st_ino for path in Path("work/cache").glob("*/*.h5")}
    assert kept
    run("cache", **{"cache.batch_size": 1})
    assert contents("data/latents") == whole
    assert {name: Path("data/latents", name).stat().st_ino for name in kept} == kept


def test_latents_name_their_tokenizer(with_tokenizer):
    run("cache")
    store = LatentStore("data/latents", "val")
    assert store.tokenizer == sha256("data/tokenizer/tokenizer.safetensors")
    assert len(store) == VAL


def test_cache_without_a_tokenizer_is_one_line_and_keeps_old_latents(with_tokenizer, capsys):
    run("cache")
    before = contents("data/latents")
    path = Path("data/tokenizer/tokenizer.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    assert one_stage.main("cache") == 1
    sentence, details = capsys.readouterr().err.splitlines()
    assert sentence.startswith("cache: data/tokenizer/tokenizer.safetensors is not a readable safetensors file")
    assert details == "(details: work/logs/cache.log)"
    assert contents("data/latents") == before
