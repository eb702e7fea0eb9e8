"""What params.yaml holds: one frozen dataclass per section, and what must agree between them.

Every field carries its documentation, its unit and its limits (`ear.schema`), so that `python -m ear.configure` can
write a commented params.yaml and `load` can say what is allowed.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from ear import schema
from ear.schema import option

_DIFFUSION_STEPS = 1000  # of training; ear.scores.hyvarinen has them
_PRECISIONS = ("float32", "tfloat32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the images come from and the size they are brought to."""

    source: str = option(
        "digits (embedded), folder (EXIF rotation applied) or imagenet (1000 classes or refused, rotation ignored)",
        choices=("digits", "folder", "imagenet"),
    )
    path: str = option("class folders, or ImageNet's tree or archives; `python -m ear.inspect PATH` says what it holds")
    val_fraction: float = option("share of images held out where the source has no val split", above=0, below=1)
    image_size: int = option("pixels; images become image_size x image_size", minimum=4)
    mirror: bool = option("train on mirror images too (not for text or digits)")


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """How decoded images are stored."""

    shard_size: int = option("images per HDF5 file", minimum=1)
    compression: str = option(
        "none (contiguous, fastest) or gzip (lossless, one chunk per image)", choices=("none", "gzip")
    )
    max_rejected: int = option("unreadable images to record in rejected.csv before the stage fails", minimum=0)


@dataclass(frozen=True, kw_only=True)
class Compute:
    """What changes the last bits of every number computed."""

    threads: int = option("CPU threads of torch; another number gives other last bits", minimum=1)


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """The map between images and continuous latents."""

    name: str = option(
        "kl (autoencoder trained here), published or diffusers (imported), identity (pixels, space to depth)",
        choices=("kl", "published", "diffusers", "identity"),
    )
    weights: str = option("published: checkpoint file; diffusers: folder of an AutoencoderKL")
    downsample: int = option("image pixels per latent cell along a side, a power of two", minimum=1)
    channels: int = option("latent channels (identity: 3 downsample^2, whatever stands here)", minimum=1)
    block_channels: tuple[int, ...] = option("kl: feature channels per level, log2(downsample) + 1 of them", minimum=1)
    layers: int = option("kl: residual blocks per level", minimum=1)
    kl_weight: float = option("kl: weight of the KL term, per image, against the mean absolute error", minimum=0)
    perceptual_weight: float = option("kl: weight of LPIPS against the mean absolute error; 0 for none", minimum=0)
    perceptual_folder: str = option(
        "kl: folder with vgg16-397923af.pth and weights-vgg16-lpips.pth; empty: torch's own, downloaded where absent"
    )
    adversarial_weight: float = option("kl: adaptive weight of a patch critic's judgement; 0 for none", minimum=0)
    adversarial_start: int = option(
        "kl: images before that judgement counts; the critic learns from half of it on", minimum=0
    )
    images: int = option("kl: images seen in training", minimum=1)
    batch_size: int = option("kl: images per step; all: images described at once", minimum=1)
    micro_batch_size: int = option("kl: images per forward pass of training; must divide batch_size", minimum=1)
    learning_rate: float = option("kl: peak rate of AdamW; linear warm-up over 5% of the images, cosine decay", above=0)
    ema_decay: float = option("kl: decay per step of the averaged weights", minimum=0, below=1)
    seed: int = option("kl: seed of weights, order and noise", minimum=0)


@dataclass(frozen=True, kw_only=True)
class Cache:
    """How latents are computed and stored."""

    batch_size: int = option("images encoded at once; another number gives other last bits", minimum=1)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The transformer over latent tokens and the size of its head."""

    patch_size: int = option("latent cells per token along a side", minimum=1)
    width: int = option("transformer width", minimum=1)
    depth: int = option("transformer blocks", minimum=1)
    heads: int = option("attention heads; must divide width", minimum=1)
    mlp_ratio: float = option("MLP width over transformer width", above=0)
    buffer_size: int = option("class tokens in front of the image tokens", minimum=1)
    dropout: float = option("dropout of attention and MLP", minimum=0, below=1)
    label_dropout: float = option(
        "share of training labels replaced by the null class, for guidance", minimum=0, maximum=1
    )
    attention: str = option(
        "bidirectional (masked tokens, several per step) or causal (one token after the other)",
        choices=("bidirectional", "causal"),
    )
    order: str = option(
        "of the tokens: random (one per image) or raster (causal: row by row)", choices=("random", "raster")
    )
    target_positions: bool = option("causal: a slot knows which position it predicts; random order needs it")
    mask_ratio_min: float = option("bidirectional: least share of masked tokens in training", above=0, maximum=1)
    head_width: int = option("width of the head's residual blocks", minimum=1)
    head_depth: int = option("residual blocks of the head", minimum=1)


@dataclass(frozen=True, kw_only=True)
class Score:
    """The strictly proper score that training maximises; options of the scores not chosen have no effect."""

    name: str = option(
        "energy, kernel, logarithmic (GIVT), hyvarinen (diffusion loss) or categorical (quantised baseline)",
        choices=("energy", "kernel", "logarithmic", "hyvarinen", "categorical"),
    )
    samples: int = option("energy, kernel: samples per token, at least 2; hyvarinen: noisings", minimum=1)
    pairs: str = option(
        "energy, kernel: samples that repel each other: all pairs (least variance) or disjoint (as published)",
        choices=("all", "disjoint"),
    )
    targets: int = option("energy, kernel: draws of each target from the tokenizer's posterior", minimum=1)
    noise: str = option("energy, kernel: uniform on [-0.5, 0.5) or gaussian", choices=("uniform", "gaussian"))
    noise_channels: int = option("energy, kernel: noise dimensions per token", minimum=1)
    alpha: float = option("energy: exponent of the distance, strictly between 0 and 2", above=0, below=2)
    smoothing: float = option("energy: distances are smoothed below this length; 1e-6, or 1e-2 for alpha < 1", above=0)
    bandwidths: tuple[float, ...] = option("kernel: widths of the Gaussian kernels, over sqrt(token channels)", above=0)
    components: int = option("logarithmic: Gaussians of the mixture", minimum=1)
    covariance: str = option("logarithmic: diagonal or full", choices=("diagonal", "full"))
    scale_floor: float = option("logarithmic: least standard deviation, in units of the latents'", above=0)
    sampling_steps: int = option("hyvarinen: denoising steps per token, of 1000 in training", minimum=1)
    denoised_limit: float = option(
        "hyvarinen: clamp of predicted tokens, in standard deviations; 0 for none", minimum=0
    )
    codes: int = option("categorical: size of the k-means codebook", minimum=2)


@dataclass(frozen=True, kw_only=True)
class Train:
    """The first phase of training."""

    weights: str = option("published EAR checkpoint to start from, on the latents of its tokenizer; empty for none")
    images: int = option("images seen in all; 0 takes the weights as they are", minimum=0)
    global_batch_size: int = option("images per optimiser step, over all processes", minimum=1)
    micro_batch_size: int = option(
        "images per forward pass; must divide global_batch_size / number of processes", minimum=1
    )
    learning_rate: float = option("peak rate of AdamW", above=0)
    warmup_images: int = option("images over which the rate grows linearly from 0", minimum=0)
    schedule: str = option("rate after the warm-up: constant or cosine (to 0)", choices=("constant", "cosine"))
    head_rate: float = option("rate of the head's matrices relative to the rest", above=0)
    beta1: float = option("AdamW: decay of the first moment", minimum=0, below=1)
    beta2: float = option("AdamW: decay of the second moment", minimum=0, below=1)
    weight_decay: float = option("AdamW: weight decay of the transformer's matrices", minimum=0)
    clip_norm: float = option("gradient norm limit", above=0)
    temperature: float = option(
        "training temperature of the score, in (0, 1]; 1 is strictly proper", above=0, maximum=1
    )
    ema_decay: float = option("decay per step of the averaged weights, reached after a warm-up", minimum=0, below=1)
    ema_decay_long: float = option("decay of a second average, scored beside the first", minimum=0, below=1)
    precision: str = option(
        "float32, or on CUDA tfloat32 (float32 with fast products) or bfloat16 (autocast; weights stay float32)",
        choices=_PRECISIONS,
    )
    validate_images: int = option("images between validations", minimum=1)
    checkpoint_images: int = option("images between checkpoints", minimum=1)
    seed: int = option("seed of weights, order, masks and noise", minimum=0)


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """The short second phase; what is not named here is taken from train."""

    images: int = option("images seen in this phase; 0 leaves the model as it is", minimum=0)
    learning_rate: float = option("rate of AdamW, without warm-up", above=0)
    schedule: str = option("constant or cosine (to 0)", choices=("constant", "cosine"))
    temperature: float = option("training temperature of the score, in (0, 1]", above=0, maximum=1)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """How images are generated."""

    count: int = option("images, spread evenly over the classes", minimum=1)
    steps: int = option("unmasking steps per image; causal attention takes one step per token instead", minimum=1)
    guidance: float = option("classifier-free guidance scale; 1 is none", minimum=0)
    schedule: str = option(
        "guidance over the steps: linear (from 1 up to the scale) or constant", choices=("linear", "constant")
    )
    temperature: float = option("inference temperature; 1 is none", minimum=0)
    precision: str = option(
        "float32, or on CUDA tfloat32 or bfloat16 (autocast; tokens and decoder stay float32)", choices=_PRECISIONS
    )
    batch_size: int = option("images generated at once; another number gives other last bits", minimum=1)
    seed: int = option("image k is drawn from its own stream (seed, k)", minimum=0)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What generated images are compared with, and in which features."""

    extractor: str = option(
        "classifier (trained here on the real images) or inception", choices=("classifier", "inception")
    )
    weights: str = option("inception: weights file; empty lets torch-fidelity download it")
    statistics: str = option("inception: npz with mu and sigma to use instead of the training images; empty for none")
    batch_size: int = option("images per forward pass; another number gives other last bits", minimum=1)
    images: int = option("classifier: images seen in training", minimum=1)
    learning_rate: float = option("classifier: peak rate of AdamW, cosine decay", above=0)
    seed: int = option("classifier: seed of weights and order", minimum=0)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """How generated images are scored."""

    repeats: int = option(
        "runs of sample.count / repeats images scored on their own: figures are means, with their range", minimum=1
    )
    kid_subset_size: int = option("KID: images per subset; at most the number of images", minimum=2)
    neighborhood: int = option("precision and recall: k of the k-nearest-neighbour manifolds", minimum=1)
    seed: int = option("seed of KID's subsets and Inception score's splits", minimum=0)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What must not change a result; DVC does not track it."""

    device: str = option("auto (cuda where there is one), cpu or cuda", choices=("auto", "cpu", "cuda"))
    processes: int = option(
        "processes per stage on this machine, one per GPU; fewer or more give the same batches and other last bits",
        minimum=1,
    )
    workers: int = option("processes that decode images or load latents", minimum=0)
    cluster: str = option(
        "Dask scheduler, such as tcp://host:8786, to whose workers prepare, cache and sample send shards; or empty"
    )
    compile: bool = option("torch.compile the transformer in training and sampling, where the device is CUDA")
    checkpointing: bool = option("training: compute activations again in the backward pass to save memory")


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """All of params.yaml. Raises ValueError where two values cannot stand together."""

    data: Data
    prepare: Prepare
    compute: Compute
    tokenizer: Tokenizer
    cache: Cache
    model: Model
    score: Score
    train: Train
    finetune: Finetune
    sample: Sample
    reference: Reference
    evaluate: Evaluate
    runtime: Runtime

    def __post_init__(self):
        """Check every pair of values that must agree."""
        _check_tokenizer(self.data, self.tokenizer)
        _check_model(self.data, self.tokenizer, self.model)
        if self.train.global_batch_size % self.train.micro_batch_size:
            raise ValueError(
                f"train.micro_batch_size is {self.train.micro_batch_size} and does not divide train.global_batch_size, "
                f"{self.train.global_batch_size}; choose a divisor."
            )
        _check_score(self.score)
        if not self.train.images and not self.train.weights:
            raise ValueError(
                "train.images is 0, but train.weights is empty: there would be no model; raise train.images, or name a "
                "published checkpoint in train.weights."
            )
        if self.sample.count % self.evaluate.repeats:
            raise ValueError(
                f"evaluate.repeats is {self.evaluate.repeats} and does not divide sample.count, {self.sample.count}; "
                "published figures have 50,000 images per repeat."
            )
        if self.data.source != "digits" and not self.data.path:
            raise ValueError(f"data.path is empty, but data.source is {self.data.source}; name the folder of images.")
        if self.reference.extractor == "classifier" and self.reference.statistics:
            raise ValueError(
                f"reference.statistics is {self.reference.statistics!r}, but a classifier trained here has no "
                "published statistics; set reference.extractor to inception, or reference.statistics to ''."
            )


def _check_score(score: Score) -> None:
    """What the score that is chosen cannot take."""
    if score.name in ("energy", "kernel"):
        if score.samples < 2:
            raise ValueError(
                f"score.samples is {score.samples}, but score.name is {score.name}, which compares samples with each "
                "other; it must be at least 2."
            )
        if score.pairs == "disjoint" and score.samples % 2:
            raise ValueError(
                f"score.samples is {score.samples}, but score.pairs is disjoint; choose an even number, or all."
            )
    if score.name == "hyvarinen" and score.sampling_steps > _DIFFUSION_STEPS:
        raise ValueError(
            f"score.sampling_steps is {score.sampling_steps}, but training has {_DIFFUSION_STEPS} steps; lower it to "
            "these at most."
        )


_LEAST_SIDE = {"perceptual_weight": 16, "adversarial_weight": 24}  # pixels that its network leaves something of


def _check_tokenizer(data: Data, tokenizer: Tokenizer) -> None:
    levels = int(math.log2(tokenizer.downsample))
    if 2**levels != tokenizer.downsample:
        raise ValueError(f"tokenizer.downsample is {tokenizer.downsample}; it must be a power of two, such as 4 or 16.")
    if data.image_size % tokenizer.downsample:
        raise ValueError(
            f"data.image_size is {data.image_size}, which tokenizer.downsample, {tokenizer.downsample}, does not "
            "divide; change one of them."
        )
    if tokenizer.name == "kl" and len(tokenizer.block_channels) != levels + 1:
        raise ValueError(
            f"tokenizer.block_channels has {len(tokenizer.block_channels)} entries, but tokenizer.downsample "
            f"{tokenizer.downsample} needs {levels + 1}; give one number of channels per level."
        )
    if tokenizer.name == "kl" and tokenizer.batch_size % tokenizer.micro_batch_size:
        raise ValueError(
            f"tokenizer.micro_batch_size is {tokenizer.micro_batch_size} and does not divide tokenizer.batch_size, "
            f"{tokenizer.batch_size}; choose a divisor."
        )
    if tokenizer.name in ("published", "diffusers") and not tokenizer.weights:
        raise ValueError(
            f"tokenizer.weights is empty, but tokenizer.name is {tokenizer.name}; name the file or folder to import."
        )
    for key, least in _LEAST_SIDE.items():
        if tokenizer.name == "kl" and getattr(tokenizer, key) and data.image_size < least:
            raise ValueError(
                f"tokenizer.{key} is {getattr(tokenizer, key)}, but its network needs {least} pixels a side and "
                f"data.image_size is {data.image_size}; set tokenizer.{key} to 0."
            )


def _check_model(data: Data, tokenizer: Tokenizer, model: Model) -> None:
    side = data.image_size // tokenizer.downsample
    if side % model.patch_size:
        raise ValueError(
            f"model.patch_size is {model.patch_size} and does not divide the latent side, {side} "
            f"(data.image_size / tokenizer.downsample); choose a divisor of {side}."
        )
    if model.width % model.heads:
        raise ValueError(
            f"model.heads is {model.heads} and does not divide model.width, {model.width}; choose a divisor."
        )
    if model.attention == "bidirectional" and model.order == "raster":
        raise ValueError(
            "model.order is 'raster', but bidirectional attention predicts any tokens from any others; set it to "
            "random, or model.attention to causal."
        )
    if model.attention == "causal" and model.order == "random" and not model.target_positions:
        raise ValueError(
            "model.target_positions is false, but with causal attention in random order nothing else tells a slot "
            "which position it predicts; set it to true, or model.order to raster."
        )


def missing_files(parameters: Parameters) -> dict[str, str]:
    """Key => what is wrong and what to do, for every file or folder that is named and needed but not there."""
    tokenizer, reference = parameters.tokenizer, parameters.reference
    imports = tokenizer.name in ("published", "diffusers")
    perceptual = tokenizer.name == "kl" and tokenizer.perceptual_weight > 0
    inception = reference.extractor == "inception"
    needed = {
        "data.path": (parameters.data.path, parameters.data.source != "digits", "name the folder of your images"),
        "tokenizer.weights": (tokenizer.weights, imports, "set tokenizer.name to kl to train an autoencoder"),
        "tokenizer.perceptual_folder": (tokenizer.perceptual_folder, perceptual, "set it to '' to download its files"),
        "train.weights": (parameters.train.weights, True, "set it to '' to train from new weights"),
        "reference.weights": (reference.weights, inception, "set it to '' to download the file"),
        "reference.statistics": (reference.statistics, inception, "set it to '' to use the training images"),
    }
    return {
        key: f"{key} is {path!r}, which does not exist; bring it, or {otherwise}."
        for key, (path, used, otherwise) in needed.items()
        if used and path and not Path(path).exists()
    }


def load(path: str | Path = "params.yaml") -> Parameters:
    """Read and check a parameter file.

    Raises:
        FileNotFoundError: the file is absent.
        ValueError: it is not YAML, or a key is unknown, missing, of the wrong type, out of range or at odds with
            another; the message names the key, its value and what is allowed.
    """
    # OmegaConf reads numbers as DVC does; PyYAML would read 1e-4 as a string.
    from omegaconf import OmegaConf
    from yaml import YAMLError

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; write it with `python -m ear.configure preset=digits`.")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    return parse(content, origin=str(path))


def parse(content: dict, *, origin: str = "parameters") -> Parameters:
    """Nested plain values => Parameters. `origin` names the file in messages; raises ValueError as `load` does."""
    try:
        return schema.build(Parameters, content)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
