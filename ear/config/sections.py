"""The sections of params.yaml, one class each, except `score` (ear.config.scores).

A field's description becomes its comment in params.yaml and its entry in `ear configure --help`. No field has a
default: DVC cannot track a key that is absent from params.yaml.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_LARGEST_SEED = 2**32 - 1  # of NumPy's generators, which torch-fidelity uses
_DIFFUSION_STEPS = 1000  # ear.scores.hyvarinen.TRAINING_STEPS, which cannot be imported without torch
# Keys of earlier versions => what they are called now.
MOVED = {"score.sampling_steps": "sample.denoising_steps", "score.denoised_limit": "sample.denoised_limit"}
Precision = Literal["float32", "tfloat32", "bfloat16"]
_list_as_tuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], _list_as_tuple]  # YAML lists, frozen
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], _list_as_tuple]
Lengths = Annotated[tuple[Annotated[float, Field(gt=0)], ...], _list_as_tuple]


class Section(BaseModel):
    """Base of all sections: exact types, unknown keys refused, immutable."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Data(Section):
    """Where the images come from, and the size they are cropped to."""

    source: Literal["digits", "folder", "imagenet", "idx", "npz"] = Field(
        description="digits (built in), folder (class folders; applies EXIF rotation), imagenet (requires its 1000 "
        "classes; ignores EXIF rotation), idx (the MNIST family's files) or npz (arrays)"
    )
    path: str = Field(
        description="class folders, ImageNet's tree or archives, folder of idx files, or npz file; check it with `ear "
        "inspect PATH`"
    )
    class_names: Names = Field(description="names of the classes for people, in the order of labels; []: the source's")
    val_fraction: float = Field(description="share of each class held out if the source has no val split", gt=0, lt=1)
    image_size: int = Field(description="pixels; images are cropped to image_size x image_size", ge=4)
    mirror: bool = Field(description="also train on mirror images (not for text or digits)")


class Prepare(Section):
    """How decoded images are stored."""

    shard_size: int = Field(description="images per HDF5 file", ge=1)
    compression: Literal["none", "gzip", "links"] = Field(
        description="none (contiguous, fastest), gzip (lossless), or links (no pixels: each pass decodes again)"
    )
    max_rejected: int = Field(
        description="unreadable images to skip and list in rejected.csv; with more, the stage fails", ge=0
    )


class Compute(Section):
    """Settings that affect the floating-point rounding of every number."""

    threads: int = Field(description="CPU threads of torch; changes results slightly (rounding)", ge=1)


class Tokenizer(Section):
    """The map between images and continuous latents."""

    name: Literal["kl", "pca", "published", "diffusers", "identity"] = Field(
        description="kl (autoencoder trained here), pca (principal components of patches), published or diffusers "
        "(imported), identity (pixels, space to depth)"
    )
    weights: str = Field(description="published: checkpoint file; diffusers: folder of an AutoencoderKL")
    downsample: int = Field(description="image pixels per latent cell along a side, a power of two", ge=1)
    channels: int = Field(description="latent channels; ignored for identity (always 3 * downsample^2)", ge=1)
    whitening: float = Field(
        description="pca: scale of a component, its standard deviation to the power of -whitening; 1: equal variances",
        ge=0,
        le=1,
    )
    block_channels: Counts = Field(
        description="kl: feature channels per level, log2(downsample) + 1 values", min_length=1
    )
    layers: int = Field(description="kl: residual blocks per level", ge=1)
    kl_weight: float = Field(
        description="weight of the KL term of an image relative to its absolute error, both summed; used to train kl, "
        "and in the held-out loss of every tokenizer",
        ge=0,
    )
    perceptual_weight: float = Field(
        description="kl: weight of LPIPS relative to the mean absolute error; 0: off", ge=0
    )
    perceptual_folder: str = Field(
        description="kl: folder with vgg16-397923af.pth and weights-vgg16-lpips.pth; empty: torch's cache, downloaded "
        "if absent"
    )
    adversarial_weight: float = Field(description="kl: weight of the patch critic's adaptive loss; 0: off", ge=0)
    adversarial_start: int = Field(
        description="kl: images before the critic contributes to the loss; it trains from half of that", ge=0
    )
    images: int = Field(description="kl: training images, counted with repetition", ge=1)
    batch_size: int = Field(description="kl: images per step; every tokenizer: images per batch in evaluation", ge=1)
    micro_batch_size: int = Field(description="kl: images per forward pass in training; must divide batch_size", ge=1)
    learning_rate: float = Field(
        description="kl: peak rate of AdamW; linear warm-up over 5% of the images, cosine decay", gt=0
    )
    ema_decay: float = Field(description="kl: EMA decay per step", ge=0, lt=1)
    precision: Precision = Field(
        description="kl: training in float32; on CUDA also tfloat32 or bfloat16 (autocast, float32 weights and loss)"
    )
    seed: int = Field(
        description="kl: seed of weights, data order, noise; every tokenizer: of the noise in held-out metrics", ge=0
    )


class Cache(Section):
    """How latents are computed."""

    batch_size: int = Field(description="images encoded per batch; changes results slightly (rounding)", ge=1)
    noise_limit: float = Field(
        description="latent channels with a larger share of noise (the posterior's) in their variance carry no "
        "information: models see their mean; 1: keep all",
        gt=0,
        le=1,
    )


class Model(Section):
    """The transformer over latent tokens, and the size of its head."""

    patch_size: int = Field(description="latent cells per token along a side", ge=1)
    blocks: Literal["vit", "modern"] = Field(
        description="transformer blocks: vit (as published) or modern (RMSNorm, QK-norm, SwiGLU, rotary positions)"
    )
    width: int = Field(description="transformer width", ge=1)
    depth: int = Field(description="transformer blocks", ge=1)
    heads: int = Field(description="attention heads; must divide width", ge=1)
    mlp_ratio: float = Field(description="MLP width relative to transformer width", gt=0)
    buffer_size: int = Field(
        description="buffer tokens, copies of the class embedding, in front of the image tokens", ge=1
    )
    dropout: float = Field(description="dropout of attention and MLP", ge=0, lt=1)
    label_dropout: float = Field(
        description="share of training labels replaced by the null class, for guidance", ge=0, le=1
    )
    attention: Literal["bidirectional", "causal"] = Field(
        description="bidirectional (masked tokens, several per step) or causal (one token after the other)"
    )
    order: Literal["random", "raster"] = Field(
        description="token order: random (one per image) or raster (causal only)"
    )
    target_positions: bool = Field(
        description="causal: tell each slot which position it predicts; random order needs it"
    )
    mask_ratio_min: float = Field(description="bidirectional: smallest share of masked tokens in training", gt=0, le=1)
    head_width: int = Field(description="width of the head's residual blocks", ge=1)
    head_depth: int = Field(description="residual blocks of the head", ge=1)


class Train(Section):
    """The first training phase."""

    weights: str = Field(description="published EAR checkpoint to start from, on its tokenizer's latents; empty: none")
    embedding_sd: float = Field(
        description="standard deviation of initial embeddings: classes, mask, positions; published: 0.02", gt=0
    )
    images: int = Field(description="training images, counted with repetition; 0 keeps the initial weights", ge=0)
    global_batch_size: int = Field(description="images per optimiser step, over all processes", ge=1)
    micro_batch_size: int = Field(
        description="images per forward pass; must divide global_batch_size / number of processes", ge=1
    )
    optimizer: Literal["adamw", "muon"] = Field(
        description="adamw, or muon (orthogonal updates) for the matrices of the blocks and AdamW for all others"
    )
    learning_rate: float = Field(description="peak rate", gt=0)
    warmup_images: int = Field(description="images over which the rate grows linearly from 0", ge=0)
    schedule: Literal["constant", "cosine"] = Field(description="rate after the warm-up: constant or cosine (to 0)")
    head_rate: float = Field(description="rate of the head's matrices relative to the rest", gt=0)
    beta1: float = Field(description="AdamW: decay of the first moment", ge=0, lt=1)
    beta2: float = Field(description="AdamW: decay of the second moment", ge=0, lt=1)
    weight_decay: float = Field(description="weight decay of the transformer's matrices", ge=0)
    clip_norm: float = Field(description="gradient norm limit", gt=0)
    temperature: float = Field(
        description="energy, kernel: training temperature of the score; only 1 is strictly proper", gt=0, le=1
    )
    ema_decay: float = Field(description="EMA decay per step, reached after a warm-up", ge=0, lt=1)
    ema_decay_long: float = Field(description="EMA decay of a second average, validated beside the first", ge=0, lt=1)
    precision: Precision = Field(
        description="float32; on CUDA also tfloat32 (float32 with TF32 matmuls) or bfloat16 (autocast, float32 weights)"
    )
    validate_images: int = Field(description="images between validations", ge=1)
    seed: int = Field(description="seed of weights, data order, masks and noise", ge=0)


class Finetune(Section):
    """The short second phase; all other settings are those of train."""

    images: int = Field(description="training images, counted with repetition; 0 skips this phase", ge=0)
    learning_rate: float = Field(description="rate, without warm-up", gt=0)
    schedule: Literal["constant", "cosine"] = Field(description="constant or cosine (to 0)")
    temperature: float = Field(description="energy, kernel: training temperature, in (0, 1]", gt=0, le=1)


class Sample(Section):
    """How images are generated."""

    count: int = Field(description="images, spread evenly over the classes", ge=1)
    steps: int = Field(description="unmasking steps per image; ignored by causal models (one step per token)", ge=1)
    guidance: float = Field(description="classifier-free guidance scale; 1: off", ge=0)
    schedule: Literal["linear", "constant"] = Field(
        description="guidance over the steps: linear (from 1 to the scale) or constant"
    )
    guidance_from: float = Field(
        description="use guidance in steps after which more than this share of the tokens is known; 0: from the start",
        ge=0,
        lt=1,
    )
    guidance_to: float = Field(
        description="and at most this share; 1: to the end. A masked model's unguided steps take half the time",
        gt=0,
        le=1,
    )
    temperature: float = Field(
        description="inference temperature; 1: unchanged; draws of energy and kernel heads still vary at 0", ge=0
    )
    denoising_steps: int = Field(
        description=f"hyvarinen: denoising steps per token, of {_DIFFUSION_STEPS} in training",
        ge=1,
        le=_DIFFUSION_STEPS,
    )
    denoised_limit: float = Field(
        description="hyvarinen: clamp of predicted tokens, in standard deviations of all latents; 0: off", ge=0
    )
    precision: Precision = Field(description="float32; on CUDA also tfloat32 or bfloat16 (autocast, float32 tokens)")
    decoder_precision: Precision = Field(description="of the tokenizer's decoder; as precision")
    batch_size: int = Field(description="images generated per batch; changes results slightly (rounding)", ge=1)
    seed: int = Field(description="image k is drawn from its own random stream (seed, k)", ge=0, lt=2**63)


class Reference(Section):
    """The real images that generated ones are compared with, and the features used."""

    extractor: Literal["classifier", "inception"] = Field(
        description="classifier (trained here on the real images) or inception"
    )
    weights: str = Field(description="inception: weights file; empty: torch-fidelity downloads it")
    statistics: str = Field(description="inception: npz with mu and sigma, instead of the training images; empty: none")
    batch_size: int = Field(
        description="images per forward pass; classifier: also per training step, so changing it changes the features",
        ge=1,
    )
    images: int = Field(description="classifier: training images, counted with repetition", ge=1)
    learning_rate: float = Field(description="classifier: peak rate of AdamW, cosine decay", gt=0)
    seed: int = Field(description="classifier: seed of weights and data order", ge=0, le=_LARGEST_SEED)


class Evaluate(Section):
    """How generated images are scored."""

    repeats: int = Field(
        description="blocks of sample.count / repeats images, scored separately: metrics are means, with their range",
        ge=1,
    )
    kid_subset_size: int = Field(description="KID: images per subset; at most the number of images", ge=2)
    neighborhood: int = Field(description="precision and recall: k of the k-nearest-neighbour manifolds", ge=1)
    seed: int = Field(description="seed of KID's subsets and Inception score's splits", ge=0, le=_LARGEST_SEED)


class Runtime(Section):
    """Settings that change results by rounding at most; DVC does not track them."""

    device: Literal["auto", "cpu", "cuda"] = Field(description="auto (cuda if available), cpu or cuda")
    processes: int = Field(
        description="processes per stage on this machine, one per GPU; same batches, slightly different rounding", ge=1
    )
    workers: int = Field(description="processes that decode images, threads that load latents", ge=0)
    cluster: str = Field(
        description="Dask scheduler for prepare, cache and sample, such as tcp://host:8786; empty: this machine"
    )
    checkpoint_images: int = Field(
        description="images between checkpoints of train and finetune; a killed run loses about this many at most", ge=1
    )
    keep_images: int = Field(
        description="images between checkpoints of train and finetune to keep in work/kept; 0: keep none", ge=0
    )
    other_code: Literal["refuse", "continue", "restart"] = Field(
        description="unfinished work begun under other code or libraries: refuse (stop and say so), continue or restart"
    )
    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(
        description="log running trainings to tensorboard, mlflow, wandb (docs/watching.md)"
    )
    compile: bool = Field(description="torch.compile transformer and head in training and sampling, on CUDA only")
    sharded: bool = Field(
        description="divide weights, moments and EMAs among the processes (FSDP2), for models beyond one GPU's memory"
    )
    checkpointing: bool = Field(description="recompute activations in the backward pass of training to save memory")
