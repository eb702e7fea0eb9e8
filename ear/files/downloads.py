"""Published files, downloaded once and checked."""

import http.client
from pathlib import Path

from ear.errors import MissingFileError, UserError
from ear.files.digests import named_digest, sha256


def downloaded(url: str, *, otherwise: str) -> Path:
    """The file of `url` in torch's hub folder, downloaded where it is not there yet and checked by `named_digest`.

    Raises FileNotFoundError, whose sentence ends in `otherwise`, what the user can do, where it cannot be downloaded;
    ValueError where the file there is another one than its name says.
    """
    import torch

    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    digest = named_digest(path)
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=False)
        except (OSError, http.client.HTTPException, RuntimeError) as error:  # the last one for another digest
            raise MissingFileError(f"{path.name} cannot be downloaded ({error}); {otherwise}.") from error
    if not sha256(path).startswith(digest):
        raise UserError(f"{path} is damaged: its SHA-256 does not start with {digest}; delete it and run this again.")
    return path
