"""Published files, downloaded once and checked."""

import http.client
from pathlib import Path

from ear.errors import MissingFileError, UserError
from ear.files.digests import named_digest, sha256


def downloaded(url: str, *, otherwise: str) -> Path:
    """The file of `url` in torch's hub folder: downloaded if absent, checked against the digest in its name.

    Raises MissingFileError if it cannot be downloaded (`otherwise` is what the user can do instead), UserError if its
    digest is wrong.
    """
    import torch

    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    digest = named_digest(path)
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=False)
        except (OSError, http.client.HTTPException, RuntimeError) as error:  # RuntimeError: the digest is wrong
            raise MissingFileError(f"{path.name} cannot be downloaded ({error}); {otherwise}.") from error
    if not sha256(path).startswith(digest):
        raise UserError(f"{path} is damaged: its SHA-256 does not start with {digest}; delete it and run this again.")
    return path
