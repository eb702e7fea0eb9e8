"""Write a model file from a checkpoint of a training (`ear export`)."""

from pathlib import Path

from ear.model.files import load_model, save_model


def run(checkpoint: Path, output: Path, *, weights: str | None = None) -> str:
    """Write one set of weights of a checkpoint as a model file => a line to print. Raises UserError, OSError."""
    model, description = load_model(checkpoint, weights)
    latents = {key: description[key] for key in ("statistics", "tokenizer")}
    save_model(output, model, latents)
    return f"wrote {output}: {sum(p.numel() for p in model.parameters()):,} parameters"
