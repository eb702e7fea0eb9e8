"""Parameters of the pipeline: the sections of params.yaml, their limits, and how the file is read and written.

Values and checks only, so that `import ear.config` needs no torch. DVC tracks the values; no stage depends on this
code.
"""

from ear.config.parameters import (
    Parameters,
    check_files,
    load,
    missing_files,
    named_files,
    named_paths,
    parse,
    read,
    value_of,
)
from ear.config.scores import Score
from ear.config.sections import (
    Cache,
    Compute,
    Data,
    Evaluate,
    Finetune,
    Model,
    Prepare,
    Reference,
    Runtime,
    Sample,
    Section,
    Tokenizer,
    Train,
)

__all__ = [
    "Cache",
    "Compute",
    "Data",
    "Evaluate",
    "Finetune",
    "Model",
    "Parameters",
    "Prepare",
    "Reference",
    "Runtime",
    "Sample",
    "Score",
    "Section",
    "Tokenizer",
    "Train",
    "check_files",
    "load",
    "missing_files",
    "named_files",
    "named_paths",
    "parse",
    "read",
    "value_of",
]
