"""Every preset composes, keeps the published recipe where it is one, and has a smoke preset of the same structure."""

import pytest

from ear import config
from ear.commands import configure
from ear.config import edit, missing_files
from ear.config.compose import compose, describe_preset, presets
from ear.errors import UserError
from ear.tokenizer import perceptual

PUBLISHED = {  # depth, width, heads, head depth, head width
    "imagenet256_base": (24, 768, 12, 6, 1024),
    "imagenet256_large": (32, 1024, 16, 8, 1280),
    "imagenet256_huge": (40, 1280, 16, 12, 1536),
    "imagenet512_base": (24, 768, 12, 6, 1024),
}
FULL = ("digits", "fashion", "folder64", "folder64_cpu", *PUBLISHED)


def composed(name: str, *overrides: str):
    return compose([f"preset={name}", "data.path=/images", "tokenizer.weights=/kl16.ckpt", *overrides])


def test_the_presets_and_their_smoke_forms():
    assert sorted(presets()) == sorted([*FULL, *(f"{name}_smoke" for name in FULL)])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe(name):
    p = composed(name)
    model, train, finetune, sample = p.model, p.train, p.finetune, p.sample
    assert (model.depth, model.width, model.heads, model.head_depth, model.head_width) == PUBLISHED[name]
    assert (model.patch_size, model.mlp_ratio, model.buffer_size, model.mask_ratio_min) == (1, 4.0, 64, 0.7)
    assert (model.blocks, model.dropout, model.label_dropout, p.cache.noise_limit) == ("vit", 0.1, 0.1, 1.0)
    assert (p.score.name, p.score.alpha, p.score.noise, p.score.noise_channels) == ("energy", 1.0, "uniform", 64)
    steps = 625  # an epoch
    assert train.global_batch_size == 2048
    assert train.images == 750 * steps * 2048
    assert train.warmup_images == 100 * steps * 2048
    assert finetune.images == 50 * steps * 2048
    assert (train.learning_rate, finetune.learning_rate) == pytest.approx((1e-4 * 2048 / 256, 7e-5 * 2048 / 256))
    assert (train.schedule, finetune.schedule) == ("constant", "constant")
    assert (train.temperature, finetune.temperature) == (1.0, 0.99)
    assert (train.beta1, train.beta2, train.weight_decay, train.clip_norm) == (0.9, 0.95, 0.02, 3.0)
    assert (train.head_rate, train.ema_decay, train.embedding_sd) == (0.25, 0.9999, 0.02)
    assert train.optimizer == "adamw"
    assert (sample.count, sample.steps, sample.schedule, sample.temperature) == (50_000, 64, "linear", 0.7)
    assert sample.guidance == (4.0 if "512" in name else 3.0)
    assert p.data.mirror
    assert (p.tokenizer.name, p.tokenizer.downsample, p.tokenizer.channels) == ("published", 16, 16)
    assert (p.score.samples, p.score.pairs, p.score.targets) == (4, "disjoint", 1)
    assert p.reference.extractor == "inception"


@pytest.mark.parametrize("name", FULL)
def test_smoke_forms_differ_in_size_not_in_structure(name):
    full, smoke = composed(name), composed(f"{name}_smoke")
    kept = {
        "cache": ("noise_limit",),
        "model": (
            "blocks",
            "attention",
            "order",
            "patch_size",
            "mlp_ratio",
            "dropout",
            "label_dropout",
            "mask_ratio_min",
        ),
        "score": ("name", "samples", "pairs", "targets", "noise", "alpha"),
        "train": (
            *("schedule", "embedding_sd", "optimizer", "head_rate", "beta2", "weight_decay"),
            *("clip_norm", "temperature"),
        ),
        "finetune": ("schedule", "temperature"),
        "sample": ("guidance", "schedule", "temperature"),
    }
    for section, keys in kept.items():
        values = [getattr(p, section).model_dump() for p in (full, smoke)]
        assert {k: values[0][k] for k in keys} == {k: values[1][k] for k in keys}, section
    assert (smoke.train.precision, smoke.runtime.compile, smoke.reference.extractor) == ("float32", False, "classifier")
    assert smoke.train.images <= 10_000
    assert smoke.model.depth * smoke.model.width**2 < 50_000


@pytest.mark.parametrize("name", ["folder64", "folder64_smoke", "folder64_cpu", "folder64_cpu_smoke"])
def test_a_preset_for_images_of_the_user_asks_for_their_path(name):
    with pytest.raises(ValueError, match=r"data\.path is empty, but data\.source is \w+; name the folder"):
        compose([f"preset={name}"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_presets_say_which_files_they_expect(name):
    p = compose([f"preset={name}"])
    assert (p.data.source, p.data.path) == ("imagenet", "imagenet")
    expected = missing_files(p)
    assert list(expected) == ["data.path", "tokenizer.weights", "reference.statistics"]
    assert expected["tokenizer.weights"] == (
        "tokenizer.weights is 'weights/kl16.ckpt', which does not exist; provide it, or set tokenizer.name to kl to "
        "train an autoencoder."
    )
    assert not missing_files(compose([f"preset={name}_smoke"]))
    trained = compose([f"preset={name}", "tokenizer.name=kl", "tokenizer.perceptual_folder=nowhere"])
    assert list(missing_files(trained)) == ["data.path", "tokenizer.perceptual_folder", "reference.statistics"]
    assert trained.tokenizer.block_channels == (128, 128, 256, 256, 512)


def test_of_folders_only_the_files_that_are_read_are_inputs(perceptual_folder, tmp_path):
    """Else a download into torch's folder during a training would be a changed input."""
    folders = (f"tokenizer.perceptual_folder={perceptual_folder}", "tokenizer.perceptual_weight=1")
    parameters = compose(["preset=folder64", "data.path=/images", *folders])
    assert config.named_files(parameters, "tokenizer") == perceptual.files(perceptual_folder)
    parameters = compose(["tokenizer.name=diffusers", f"tokenizer.weights={tmp_path}"])
    names = {path.name for path in config.named_files(parameters, "tokenizer")}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_a_file_is_missed_by_the_stage_that_reads_it():
    """The finetune stage depends on the section train, but never reads published weights."""
    parameters = compose(["train.weights=/absent.pth"])
    assert list(missing_files(parameters, {"train", "finetune"})) == ["train.weights"]
    assert missing_files(parameters, {"finetune", "sample"}) == {}
    assert config.named_files(parameters, "finetune") == []


def test_presets_describe_themselves():
    for name in presets():
        assert 20 < len(describe_preset(name)) < 90, name
    assert describe_preset("imagenet256_huge") == "EAR-H, 937,314,576 parameters; otherwise imagenet256_base"


def test_an_upgrade_keeps_values_adds_new_keys_and_says_so(tmp_path):
    """As a file of an earlier version: a key is missing, another exists no more."""
    path = tmp_path / "params.yaml"
    configure.run(["preset=folder64", "data.path=/images"], path)
    edit.apply(path, {"train.learning_rate": 0.5})
    text = path.read_text().replace("  trackers: []", "  printers: 3 #")
    path.write_text(text)
    assert configure.upgrade([], path) == ["added runtime.trackers: []", "removed runtime.printers"]
    parameters = config.load(path)
    assert (parameters.train.learning_rate, parameters.data.path) == (0.5, "/images")
    assert parameters.model == composed("folder64").model
    assert configure.upgrade([], path) == [f"{path} is up to date already"]


def test_an_upgrade_keeps_the_value_of_a_key_that_moved(tmp_path):
    path = tmp_path / "params.yaml"
    configure.run(["preset=digits"], path)
    text = path.read_text().replace("  denoising_steps: 100", "  steps_of_denoising: 100 #")
    path.write_text(text.replace("  codes: 512", "  sampling_steps: 50\n  codes: 512"))
    with pytest.raises(UserError, match=r"score\.sampling_steps is not .*; it is called sample\.denoising_steps now"):
        config.load(path)
    assert configure.upgrade([], path) == ["removed sample.steps_of_denoising"]
    assert config.load(path).sample.denoising_steps == 50


def test_an_upgrade_leaves_a_file_alone_whose_values_are_not_allowed(tmp_path):
    path = tmp_path / "params.yaml"
    configure.run(["preset=digits"], path)
    before = path.read_text().replace("  clip_norm: 3.0", "  clip_norm: -3.0")
    path.write_text(before)
    with pytest.raises(UserError, match=r"train\.clip_norm is -3"):
        configure.upgrade([], path)
    assert path.read_text() == before
