"""The table of faults: what is done to the pipeline, how often, what the user sees, what is lost."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.faults import damage, hostile, interruptions, long_runs, together

Outcomes = dict[str, int]  # what happened => how many times


@dataclass(frozen=True)
class Fault:
    """One row. `inject(case)` is one batch of injections, a function of its number; it raises what must not happen."""

    name: str
    title: str
    how: str
    seen: str
    lost: str
    inject: Callable[[int], Outcomes]
    quick: int  # batches
    full: int


FAULTS = [
    Fault(
        "kill",
        "SIGKILL at a random moment of `dvc repro`, over all stages",
        "the process group is killed 10 times at seeded moments, each time started again; then it may finish",
        "nothing but the shell's `Killed`; the next `dvc repro` resumes. If it says `Unable to read RWLock-file`, the "
        "kill hit DVC while it wrote its lock file: `rm .dvc/tmp/rwlock` (flows do it). If DVC calls `./dvc.lock` "
        "invalid, the kill hit it there: `git checkout dvc.lock`, or delete it; the run cache keeps finished stages",
        "the images since the last checkpoint (every `runtime.checkpoint_images` images; of the tokenizer, every tenth "
        "of its training), plus those seen while one was being written; in other stages, the shard, piece or batch "
        "in progress",
        interruptions.kill_dvc,
        1,
        10,
    ),
    Fault(
        "kill-flow",
        "SIGKILL to the flow alone, at a random moment",
        "the flow's process is killed, while DVC and the stage live on; the flow is started again at once",
        "the next flow waits for the orphaned stage, and continues",
        "nothing",
        interruptions.kill_flow,
        1,
        4,
    ),
    Fault(
        "signals",
        "SIGTERM, SIGINT, SIGHUP during a training",
        "sent to the process group of `dvc repro` in train, finetune or tokenizer; then it is started again",
        "`train was stopped by SIGTERM after N images, with a checkpoint; run it again to resume.`",
        "nothing",
        interruptions.signalled,
        3,
        9,
    ),
    Fault(
        "worker-killed",
        "a dead worker: decoding pool, Dask, torchrun",
        "SIGKILL to one worker process of prepare, cache on a cluster, or train in two processes",
        "one sentence and exit code 1 (Dask repeats the shard elsewhere and needs none)",
        "as after SIGKILL to the stage",
        interruptions.kill_worker,
        3,
        9,
    ),
    Fault(
        "edits",
        "a parameter, a code file or an input edited while a stage runs",
        "each of the three kinds in each stage, 0 to 2 s after it has started",
        "`params.yaml or code changed while the stage ran (...)`, or the input's name; exit code 1",
        "nothing: no output is published, progress is kept. An edit between the stage's last check and DVC's record is "
        "recorded as if the stage had seen it, and `ear verify` names it. DVC notices later edits of code and "
        "parameters; `ear verify` those of inputs",
        interruptions.edit,
        3,
        29,
    ),
    Fault(
        "at-once",
        "two `dvc repro`, two programs of one stage, two flows, a flow and a sweep at once",
        "started together on a fresh repository, 0 to 2 s apart",
        "flows wait for their turn; DVC and stages say that the other one is at work",
        "nothing",
        together.at_once,
        1,
        4,
    ),
    Fault(
        "prefect",
        "Prefect's server restarted, its worker killed, a run cancelled",
        "during the train stage of a deployed run; then `dvc repro`",
        "server: the run continues to its end. Worker: the run ends with it, but Prefect still shows it as Running; "
        "delete it there and start another. Cancelled: the stage saves",
        "nothing; for a killed worker, as after SIGKILL to the stage",
        together.prefect,
        0,
        3,
    ),
    Fault(
        "disk-full",
        "a full disk at any write",
        "the repository on a small tmpfs that fills at a seeded size; then it gets more room",
        "`No space left on device`, with the file; exit code 1",
        "nothing that was complete",
        damage.full_disk,
        1,
        6,
    ),
    Fault(
        "file-limit",
        "a file-size limit at any write",
        "`ulimit -f` of a seeded size for all processes of `dvc repro`; then none",
        "`File too large`, with the file; exit code 1",
        "nothing that was complete",
        damage.file_limit,
        1,
        6,
    ),
    Fault(
        "flipped-byte",
        "one flipped byte in an output, and in DVC's cache if that shares the file",
        "each kind of output file in turn",
        "`ear verify` names the file; `ear verify --repair` and `dvc repro` make it again",
        "the time to make it again",
        damage.flip,
        2,
        30,
    ),
    Fault(
        "images",
        "mutated JPEG, PNG, WebP and BMP files",
        "flipped, cut, spliced and inserted bytes of images of nine kinds, through the reader of prepare",
        "the image's name and the reason in the list of rejected images",
        "nothing; each took less than 5 s, and the process less than 500 MB",
        hostile.images,
        4,
        40,
    ),
    Fault(
        "parameters",
        "fuzzed params.yaml",
        "hypothesis changes, removes, adds and retypes keys and mangles the text",
        "one sentence that names the key, the value and what is allowed; or exactly the values of the file",
        "nothing: parameters are checked before a stage starts",
        hostile.parameters,
        2,
        10,
    ),
    Fault(
        "archives",
        "hostile and damaged tar archives in ImageNet's place",
        "names with `..`, absolute names, links, devices, FIFOs, lying sizes, mutated and cut headers",
        "one sentence with the archive, the member and the reason",
        "nothing: archives are read in place, never unpacked",
        hostile.archives,
        2,
        20,
    ),
    Fault(
        "headers",
        "lying headers of HDF5 and safetensors files",
        "seeded bytes of the first and last kilobytes of every kind of HDF5 and safetensors output, then read by its "
        "reader",
        "one sentence with the file and the stage to run again",
        "nothing",
        hostile.headers,
        2,
        20,
    ),
    Fault(
        "long-training",
        "a long training",
        "1,000 steps (full: 10,000) of the trainer with reading threads, checkpoints and validation",
        "flat memory (growth under 20 MB) and as many open files as at the start",
        "nothing",
        long_runs.memory,
        1,
        2,
    ),
]
