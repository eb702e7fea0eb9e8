"""Hostile and damaged input: images, parameters, archives, headers. In this process or a child that may crash."""

import contextlib
import io
import multiprocessing
import os
import random
import resource
import shutil
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ear.errors import UserError
from tests.faults.pipelines import template

_SECONDS = 5.0  # for one input
_MEMORY = 500_000_000  # bytes that the child may grow by


def in_child(work: Callable[[int], Counter], case: int) -> dict[str, int]:
    """Run a batch in a fresh process: a crash of a C library is found as one."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_report, args=(queue, work, case))
    child.start()
    child.join(1800)
    assert child.exitcode == 0, f"the process ended with {child.exitcode}"
    result = queue.get()
    if isinstance(result, str):
        raise AssertionError(result)
    return dict(result)


def _report(queue, work: Callable, case: int) -> None:
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            counts = work(case)
        queue.put(counts)
    except BaseException:
        queue.put(traceback.format_exc())


def mutated(content: bytes, randomness: random.Random, *, ends_only: int = 0) -> bytes:
    """Bytes flipped, overwritten, cut, inserted or repeated; `ends_only`: within so many bytes of either end."""
    data = bytearray(content)

    def position() -> int:
        if ends_only and len(data) > 2 * ends_only:
            offset = randomness.randrange(2 * ends_only)
            return offset if offset < ends_only else len(data) - 2 * ends_only + offset
        return randomness.randrange(max(len(data), 1))

    for _ in range(randomness.choice((1, 1, 2, 4, 16))):
        if not data:
            break
        at = position()
        how = randomness.randrange(6)
        if how == 0:
            data[at] ^= 1 << randomness.randrange(8)
        elif how == 1:
            data[at] = randomness.choice((0, 1, 127, 128, 255))
        elif how == 2:
            data[at : at + 4] = randomness.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\0\0\1"))
        elif how == 3:
            del data[at : at + randomness.randrange(1, 64)]
        elif how == 4:
            data[at:at] = randomness.randbytes(randomness.randrange(1, 16))
        elif not ends_only or randomness.random() < 0.3:
            del data[at:]
    return bytes(data)


def check_sentence(error: UserError, names: tuple[str, ...] = ("",)) -> None:
    """One line that is not empty, and has one of `names`."""
    text = str(error)
    assert text.strip(), "an empty message"
    assert "\n" not in text, repr(text)
    assert any(name in text for name in names), text


# --- images


def images(case: int) -> dict[str, int]:
    """500 mutated images: decoded, or refused by name, in bounded time and memory."""
    return in_child(_images, case)


def _images(case: int) -> Counter:
    from ear.data.images import decode

    found: Counter = Counter()
    sources = _pictures()
    randomness = random.Random(f"images {case}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for _ in range(500):
        kind, content = randomness.choice(sources)
        start = time.monotonic()
        try:
            image = decode(io.BytesIO(mutated(content, randomness)))
            assert image.mode == "RGB"
            found["decoded"] += 1
        except UserError as error:
            check_sentence(error)
            found["refused"] += 1
        took = time.monotonic() - start
        assert took < _SECONDS, f"{kind}: {took:.1f} s"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert grown < _MEMORY, f"{grown / 1e6:.0f} MB more memory"
    return found


def _pictures() -> list[tuple[str, bytes]]:
    """Valid images of the formats and modes that are read."""
    y, x = np.mgrid[:48, :64]
    grey = ((np.sin(x / 5) + np.cos(y / 7) + 2) * 63).astype(np.uint8)
    colour = np.stack([grey, grey.T[:48, :48].repeat(2, 1)[:, :64], 255 - grey], -1)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "JPEG": (Image.fromarray(colour), {"format": "JPEG", "exif": exif}),
        "JPEG grey": (Image.fromarray(grey), {"format": "JPEG"}),
        "JPEG CMYK, progressive": (Image.fromarray(colour).convert("CMYK"), {"format": "JPEG", "progressive": True}),
        "PNG": (Image.fromarray(colour), {"format": "PNG"}),
        "PNG palette": (Image.fromarray(colour).quantize(16), {"format": "PNG", "transparency": 0}),
        "PNG 16 bit": (Image.fromarray(grey.astype(np.uint16) * 257), {"format": "PNG"}),
        "WebP": (Image.fromarray(colour), {"format": "WEBP"}),
        "WebP lossless": (Image.fromarray(colour).convert("RGBA"), {"format": "WEBP", "lossless": True}),
        "BMP": (Image.fromarray(colour), {"format": "BMP"}),
    }
    found = []
    for name, (image, options) in kinds.items():
        content = io.BytesIO()
        image.save(content, **options)
        found.append((name, content.getvalue()))
    return found


# --- parameters


def parameters(case: int) -> dict[str, int]:
    """200 fuzzed parameter files: refused in one sentence, or read as exactly what they say."""
    return in_child(_parameters, case)


def _parameters(case: int) -> Counter:
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis import strategies as st

    text = (template() / "params.yaml").read_text()
    found: Counter = Counter()
    options = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}

    @seed(case)
    @settings(max_examples=200, phases=[Phase.generate], **options)
    @given(st.lists(_changes(_content(text)), min_size=1, max_size=3))
    def fuzz(changes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "params.yaml"
            path.write_bytes(_fuzzed(text, changes))
            _check_file(path, exact=all(how != "bytes" for how, _, _ in changes), found=found)

    fuzz()
    return found


def _content(text: str) -> dict:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.create(text))


def _changes(content: dict):
    """A strategy for one change: (how, key or seed, value)."""
    from hypothesis import strategies as st

    keys = st.sampled_from([(section, name) for section, entry in content.items() for name in entry])
    sections, names = st.sampled_from(list(content)), st.text(min_size=1, max_size=9)
    numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2**31, 2**63, 1e-300, 1e300]))
    leaves = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20), st.sampled_from(["", "auto", "1e-4"]))
    values = st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    )
    return st.one_of(
        st.tuples(st.just("set"), keys, values),
        st.tuples(st.just("near"), keys, st.floats(0.0, 4.0)),
        st.tuples(st.just("near"), keys, st.sampled_from([0.5, 1.0, 2.0])),
        st.tuples(st.just("remove"), keys, st.none()),
        st.tuples(st.just("set"), st.tuples(sections | st.just("new"), names), values),
        st.tuples(st.just("section"), st.tuples(sections, st.just("")), values),
        st.tuples(st.just("bytes"), st.integers(0, 2**32), st.none()),
    )


def _fuzzed(text: str, changes: list[tuple]) -> bytes:
    """The parameter file after the changes; one of "bytes" mangles the original text instead."""
    import yaml

    content = _content(text)
    for how, key, value in changes:
        if how == "bytes":
            return mutated(text.encode(), random.Random(key))
        section = content.setdefault(key[0], {})
        if how == "section" or not isinstance(section, dict):
            content[key[0]] = value
        elif how == "set":
            section[key[1]] = value
        elif how == "near":
            section[key[1]] = _scaled(section.get(key[1]), value)
        else:
            section.pop(key[1], None)
    return yaml.safe_dump(content, allow_unicode=True).encode()


def _check_file(path: Path, *, exact: bool, found: Counter) -> None:
    """Read the file: one sentence, or parameters; `exact`: these must be what the file says, key by key."""
    from ear import config

    try:
        read = config.load(path).model_dump(mode="json")
    except UserError as error:
        check_sentence(error)
        found["refused in one sentence"] += 1
        return
    if exact:
        assert read == _content(path.read_text()), "read as something else than it says"
    found["read as it says"] += 1


def _scaled(value: object, factor: float) -> object:
    """A value of the same type: a number times `factor`, the other truth value; texts and lists unchanged."""
    if isinstance(value, bool):
        return not value
    return type(value)(value * factor) if isinstance(value, int | float) else value


# --- archives


def archives(case: int) -> dict[str, int]:
    """100 hostile archives: their images are listed and decoded, or refused; nothing is written outside."""
    return in_child(_archives, case)


def _archives(case: int) -> Counter:
    found: Counter = Counter()
    randomness = random.Random(f"archives {case}")
    for _ in range(100):
        with tempfile.TemporaryDirectory() as parent:
            root = Path(parent) / "inside/archives"
            form = _write_hostile(root, randomness)
            before = set(Path(parent).rglob("*"))
            found[_read_all(root, Path(parent) / "inside/out", form)] += 1
            after = set(Path(parent).rglob("*")) - before
            assert all(path.is_relative_to(Path(parent) / "inside/out") for path in after), after
    return found


def _read_all(root: Path, out: Path, form: str) -> str:
    from ear.data import manifest, sources
    from ear.data.images import Encoding
    from ear.data.preparation import Layout, prepare

    start = time.monotonic()
    try:
        source = sources.find(root, val_fraction=0.2)
        (out / "raw").mkdir(parents=True)
        listed = manifest.write_manifest(
            out / "raw",
            source.images,
            tree=source.root,
            root=source.root,
            names=source.names,
            encoding=Encoding(upright=False),
        )
        prepare(
            listed,
            scratch=_made(out / "scratch"),
            target=out / "prepared",
            rejected_list=out / "rejected.csv",
            layout=Layout(8, 64, "none"),
            max_rejected=0,
            workers=0,
        )
    except UserError as error:
        check_sentence(error)
        return "refused in one sentence"
    finally:
        assert time.monotonic() - start < 4 * _SECONDS, form
    return "read: the change does not matter"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _write_hostile(root: Path, randomness: random.Random) -> str:
    """ImageNet's archives in small, with one thing wrong => what."""
    from tests import small_imagenet as small

    small.write_archives(root)
    train, val = root / "ILSVRC2012_img_train.tar", root / "ILSVRC2012_img_val.tar"
    classes = {f"{wnid}.tar": small.tar(files) for wnid, files in small.train_images().items()}
    wnid = small.WNIDS[0]
    inside = dict(small.train_images()[wnid])
    kinds = {
        "symlink": tarfile.SYMTYPE,
        "hard link": tarfile.LNKTYPE,
        "device": tarfile.CHRTYPE,
        "FIFO": tarfile.FIFOTYPE,
    }
    form = randomness.choice(["name", *kinds, "size", "header", "header", "cut", "kit", "val"])
    if form == "name":
        bad = randomness.choice(
            ["../../escape.JPEG", "/tmp/escape.JPEG", "a/../../b.JPEG", "\r.JPEG", "n\x07.JPEG", ".."]
        )
        classes[f"{wnid}.tar"] = small.tar({**inside, bad: small.jpeg(1)})
    elif form in kinds:
        member = tarfile.TarInfo(f"{wnid}_99.JPEG")
        member.type, member.linkname = kinds[form], "/etc/passwd"
        classes[f"{wnid}.tar"] = small.tar(inside, member=member)
    elif form == "size":
        content = bytearray(small.tar(inside))
        content[124:136] = randomness.choice(
            [b"77777777777\0", b"\x80" + b"\xff" * 11, b"-0000000001\0", b"00000000000\0"]
        )
        classes[f"{wnid}.tar"] = bytes(content)
    train.write_bytes(small.tar(classes))
    target = {"kit": root / "ILSVRC2012_devkit_t12.tar.gz", "val": val}.get(form, train)
    if form in ("header", "kit", "val"):
        target.write_bytes(mutated(target.read_bytes(), randomness, ends_only=600))
    elif form == "cut":
        content = train.read_bytes()
        train.write_bytes(content[: randomness.randrange(len(content))])
    return form


# --- headers


def headers(case: int) -> dict[str, int]:
    """100 files with mutated headers: read, or refused in one sentence."""
    return in_child(_headers, case)


def _headers(case: int) -> Counter:
    found: Counter = Counter()
    randomness = random.Random(f"headers {case}")
    data = template() / "data"
    readers = _readers()
    for _, read in readers:
        read(data)  # the first use imports libraries, which takes seconds
    for _ in range(100):
        name, read = randomness.choice(readers)
        with tempfile.TemporaryDirectory() as parent:
            copied = Path(parent) / "data"
            shutil.copytree(data / Path(name).parts[0], copied / Path(name).parts[0], symlinks=False)
            path = next(iter(sorted(copied.glob(name))))
            path.chmod(0o644)
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(mutated(content, randomness, ends_only=2048))
            start = time.monotonic()
            try:
                read(copied)
                found["read: the change does not matter, or a digest finds it"] += 1
            except UserError as error:
                check_sentence(error, names=(path.name, path.parent.name))
                found["refused in one sentence"] += 1
            assert time.monotonic() - start < _SECONDS, name
    return found


def _readers() -> list[tuple[str, Callable[[Path], object]]]:
    """(kind of output, what reads it, given the data folder)."""
    from ear.data.prepared import PreparedImages
    from ear.files.tensors import read_tensors
    from ear.latents.store import LatentStore
    from ear.model.files import load_model
    from ear.sampling.samples import GeneratedImages
    from ear.tokenizer.autoencoder import load_tokenizer

    def latents(data: Path) -> None:
        store = LatentStore(data / "latents", "train")
        store.rows(np.arange(len(store)), np.zeros(len(store), bool))

    def prepared(data: Path) -> None:
        images = PreparedImages(data / "prepared", "train")
        images.images(np.arange(len(images)))

    def samples(data: Path) -> None:
        images = GeneratedImages(data / "samples/samples.h5")
        images.images(range(len(images)))

    return [
        ("prepared/train-*.h5", prepared),
        ("latents/train-*.h5", latents),
        ("samples/samples.h5", samples),
        ("model/model.safetensors", lambda data: load_model(data / "model/model.safetensors")),
        ("model/state.safetensors", lambda data: read_tensors(data / "model/state.safetensors")),
        ("tokenizer/tokenizer.safetensors", lambda data: load_tokenizer(data / "tokenizer/tokenizer.safetensors")),
    ]
