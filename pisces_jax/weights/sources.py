"""Where published weights come from: a local folder, or a repository of the Hugging Face hub.

A *source* is a folder with a path separator in its name (`./siglip`, `/data/llama`), or `hf://ORG/NAME[/SUB][@REVISION]`
on the hub; a plain name is a run below --workdir.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import local_path
from pisces_jax.weights.tensors import without_safetensors

HUB = "hf://"
WEIGHTS, TOKENIZER = ("*.json", "*.safetensors"), ("*.json", "tokenizer.model", "merges.txt")
_ENDS = 2**20  # bytes


def is_folder(source: str) -> bool:
    """Whether a config's source names a folder or a repository of the hub, and not a run below --workdir."""
    return source.startswith(HUB) or os.sep in source


def resolve(source: str, wanted: Sequence[str] = WEIGHTS) -> Path:
    """The local folder of a source. From the hub, the `wanted` files are downloaded first.

    Raises:
        UserError: the folder does not exist, or the download fails.
    """
    if not source.startswith(HUB):
        path = local_path(source)
        if not path.is_dir():
            raise UserError(f"{source} is not a directory: give the folder of published weights")
        return path
    name, _, revision = source.removeprefix(HUB).partition("@")
    organisation, _, rest = name.partition("/")
    repository, _, sub = rest.partition("/")
    if not organisation or not repository:
        raise UserError(
            f"{source} does not name a repository: write hf://ORGANISATION/NAME or hf://ORGANISATION/NAME@REVISION"
        )
    import huggingface_hub

    repository, inside = f"{organisation}/{repository}", f"{sub}/" if sub else ""
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=[inside + pattern for pattern in wanted]
        )
        if wanted is WEIGHTS and not list(Path(folder, sub).glob("*.safetensors")):  # perhaps pickles
            files = huggingface_hub.list_repo_files(repository, revision=revision or None)
            there = [name.removeprefix(inside) for name in files if name.startswith(inside)]
            raise UserError(without_safetensors(source, there))
    except UserError:
        raise
    except Exception as error:  # the hub's client raises errors of many libraries
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{source} cannot be downloaded ({reason}): check its name and your access to it") from error
    return Path(folder) / sub


def folder_mark(source: str) -> str:
    """A hash that changes with a folder's weights: of the size, the first and the last megabyte of each file.

    Times are left out, since they differ between hosts that have the same files.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(resolve(source).glob("*.safetensors")):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name} {size} ".encode() + file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read())
    return digest.hexdigest()
