import json
from pathlib import Path

import jsonschema
import pytest

from ear import config
from ear.config.compose import compose
from ear.config.document import json_schema, to_yaml

ROOT = Path(__file__).parents[2]


def with_value(key: str, value) -> dict:
    """The digits preset as plain values, with one changed."""
    content = compose(["preset=digits"]).model_dump()
    section, _, name = key.partition(".")
    content[section][name] = value
    return content


def test_committed_parameters_are_the_composed_default():
    assert (ROOT / "params.yaml").read_text() == to_yaml(compose([]), "ear configure preset=digits")


def test_committed_json_schema_is_that_of_the_parameters():
    assert (ROOT / "params.schema.json").read_text() == json_schema()


def test_the_json_schema_accepts_the_parameters_and_names_limits():
    schema = json.loads(json_schema())
    content = compose(["preset=digits"]).model_dump(mode="json")
    jsonschema.validate(content, schema)
    content["score"]["alpha"] = 2.0
    with pytest.raises(jsonschema.ValidationError, match="2"):
        jsonschema.validate(content, schema)


def test_written_parameters_read_back_equal(tmp_path):
    parameters = compose(["preset=digits", "train.learning_rate=3e-5", "finetune.temperature=1"])
    (tmp_path / "params.yaml").write_text(to_yaml(parameters, "test"))
    assert config.load(tmp_path / "params.yaml") == parameters
    assert parameters.train.learning_rate == 3e-5
    assert parameters.finetune.temperature == 1.0


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("score.alpha", 2.0, ["score.alpha is 2.0", "above 0 and below 2"]),
        ("score.alpha", 0.0, ["score.alpha is 0.0", "above 0"]),
        ("score.targets", 0, ["score.targets is 0", "at least 1"]),
        ("score.components", 0, ["score.components is 0", "at least 1"]),
        ("score.bandwidths", [1.0, -0.5], ["score.bandwidths[1] is -0.5", "above 0"]),
        ("score.bandwidths", [], ["score.bandwidths is empty", "at least one"]),
        ("runtime.trackers", "mlflow", ["runtime.trackers is 'mlflow'", "a list such as [tensorboard]"]),
        ("data.class_names", ["cat", ""], ["data.class_names[1] is empty", "at least one character"]),
        ("train.warmup_images", 10**9, ["train.warmup_images is 1000000000", "at most train.images", "lower it"]),
        ("model.label_dropout", 0, ["sample.guidance is", "model.label_dropout is 0", "set sample.guidance to 1"]),
        ("score.covariance", "full_rank", ["score.covariance is 'full_rank'", "'diagonal' or 'full'"]),
        ("model.attention", "both", ["model.attention is 'both'", "'bidirectional' or 'causal'"]),
        ("model.order", "raster", ["model.order is 'raster'", "bidirectional", "causal"]),
        ("score.samples", 1, ["score.samples is 1", "at least 2"]),
        ("score.name", "enrgy", ["score.name is 'enrgy'", "'energy'"]),
        ("score.pairs", "some", ["score.pairs is 'some'", "'disjoint'"]),
        ("sample.guidance", -0.5, ["sample.guidance is -0.5", "at least 0"]),
        ("train.temperature", 1.2, ["train.temperature is 1.2", "at most 1"]),
        ("train.images", "many", ["train.images is 'many'", "a whole number"]),
        ("train.images", 1.5, ["train.images is 1.5", "a whole number"]),
        ("train.images", True, ["train.images is True", "a whole number"]),
        ("data.mirror", 1, ["data.mirror is 1", "true or false"]),
        ("train.learning_rate", float("nan"), ["train.learning_rate is nan", "a number"]),
        ("train.learning_rte", 1.0, ["train.learning_rte is not a known key", "did you mean train.learning_rate?"]),
        ("model.patch_size", 3, ["model.patch_size is 3", "latent side, 4"]),
        ("model.heads", 3, ["model.heads is 3", "model.width, 128"]),
        ("runtime.sharded", True, ["train.optimizer is muon", "whole matrices", "runtime.sharded to false"]),
        ("train.micro_batch_size", 48, ["train.micro_batch_size is 48", "train.global_batch_size, 64"]),
        ("tokenizer.micro_batch_size", 48, ["tokenizer.micro_batch_size is 48", "tokenizer.batch_size, 64"]),
        ("tokenizer.downsample", 3, ["tokenizer.downsample is 3", "power of two"]),
        ("tokenizer.block_channels", [32], ["tokenizer.block_channels has 1", "needs 2"]),
        ("tokenizer.block_channels", ["a", 1, 2], ["tokenizer.block_channels[0] is 'a'", "a whole number"]),
        ("tokenizer.name", "published", ["tokenizer.weights is empty", "tokenizer.name is published"]),
        ("tokenizer.name", "vq", ["tokenizer.name is 'vq'", "'published'"]),
        (
            "tokenizer.perceptual_weight",
            1.0,
            ["tokenizer.perceptual_weight is 1.0", "16 pixels", "data.image_size is 8"],
        ),
        (
            "tokenizer.adversarial_weight",
            0.5,
            ["tokenizer.adversarial_weight is 0.5", "24 pixels", "adversarial_weight to 0"],
        ),
        ("tokenizer.perceptual_weight", -1.0, ["tokenizer.perceptual_weight is -1.0", "at least 0"]),
        ("data.image_size", 9, ["data.image_size is 9", "tokenizer.downsample, 2"]),
        ("data.source", "folder", ["data.path is empty", "data.source is folder"]),
        ("reference.statistics", "stats.npz", ["reference.statistics is 'stats.npz'", "inception"]),
        ("sample.count", 9, ["sample.count / evaluate.repeats is 9", "10 splits; raise sample.count"]),
        ("evaluate.kid_subset_size", 1001, ["kid_subset_size is 1001", "repeats is 1000; set it to 1000 or less"]),
        ("evaluate.neighborhood", 1000, ["neighborhood is 1000", "set it below 1000"]),
    ],
)
def test_mistakes_are_one_sentence_with_key_value_and_remedy(key, value, words):
    with pytest.raises(ValueError, match=r"^origin: ") as caught:
        config.parse(with_value(key, value), origin="origin")
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_rotary_positions_need_a_multiple_of_four_channels_per_head():
    content = with_value("model.blocks", "modern")
    config.parse(content)
    content["model"]["heads"] = 64  # of width 128
    with pytest.raises(
        ValueError, match=r"^origin: model\.width / model\.heads is 2, .* or set model\.blocks to vit\.$"
    ):
        config.parse(content, origin="origin")


def test_causal_attention_in_random_order_needs_target_positions():
    content = with_value("model.attention", "causal")
    config.parse(content)
    content["model"]["target_positions"] = False
    with pytest.raises(ValueError, match=r"^origin: model\.target_positions is false.* or model\.order to raster\.$"):
        config.parse(content, origin="origin")
    content["model"]["order"] = "raster"
    config.parse(content)


def test_options_of_other_scores_do_not_matter():
    """One noising is a plain diffusion loss; the energy score needs two samples, and an even number for pairs."""
    content = compose(["score.name=hyvarinen", "score.samples=1", "score.pairs=disjoint"]).model_dump()
    config.parse(content)
    content["score"]["name"] = "kernel"
    with pytest.raises(ValueError, match=r"score\.samples is 1, but score\.name is kernel, .* at least 2"):
        config.parse(content)
    content["score"]["samples"] = 3
    with pytest.raises(ValueError, match=r"score\.samples is 3, but with score\.pairs disjoint must be even"):
        config.parse(content)
    content["score"].update(samples=2, pairs="antithetic")
    with pytest.raises(ValueError, match=r"score\.samples is 2, but .* antithetic must be even and at least 4"):
        config.parse(content)


def test_missing_and_foreign_sections_are_named():
    content = compose([]).model_dump()
    del content["train"]["images"]
    with pytest.raises(ValueError, match=r"train\.images is missing"):
        config.parse(content)
    content["train"] = 3
    with pytest.raises(ValueError, match="train is 3"):
        config.parse(content)


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="`ear configure preset=digits`"):
        config.load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("data: [")
    with pytest.raises(ValueError, match="is not a readable YAML file"):
        config.load(tmp_path / "params.yaml")


def test_every_key_documents_itself():
    for name, section in config.Parameters.model_fields.items():
        for key, field in section.annotation.model_fields.items():
            assert field.is_required(), f"{name}.{key} would be invisible to DVC"
            assert len(field.description) > 5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("preset=huge", "known presets: digits, digits_smoke, fashion, "),
        ("train.batchsize=3", "train.batchsize"),
        ("+train.extra=3", "train.extra is not a known key"),
        ("train.images=abc", "train.images is 'abc'"),
        ("score.alpha=2.0", "score.alpha is 2.0"),
    ],
)
def test_compose_names_what_is_wrong(override, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words below are the match
        compose([override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
