"""The files of a lens: found in a folder or on the Hub, and read with suspicion."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spade_eval.errors import UserError
from spade_eval.lens_config import LensConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FILES = frozenset({CONFIG, WEIGHTS, CARD})
PARAMS = "params.pt"  # what the tuned-lens package writes in place of WEIGHTS
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
_NO_PICKLE = (
    "Weights are read from safetensors only, since a pickle can run code: save the lens again "
    "with save_pretrained()."
)


def read(name: str | Path, **hub: Any) -> tuple[LensConfig, dict[str, Tensor]]:
    """Read a lens of ours, or one of the tuned-lens package.

    Args:
        name: A folder, or a hub id.
        **hub: Arguments of `hf_hub_download`: revision, cache_dir, token.

    Returns:
        The config, and the tensors by name, not yet compared with it.

    Raises:
        UserError: A file is missing or damaged.
    """
    path = _fetch(name, CONFIG, hub)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise UserError(
            f"{CONFIG} of {name} is not readable JSON ({err}). Restore the file, or fit the lens "
            "again."
        ) from err
    if isinstance(raw, dict) and {"base_model_name_or_path", "d_model"} <= raw.keys():
        return _tuned_lens(raw, _fetch(name, PARAMS, hub), str(name))
    config = LensConfig.from_json(raw, str(name))
    try:
        return config, load_file(_fetch(name, WEIGHTS, hub))
    except (SafetensorError, OSError) as err:
        raise _damaged(WEIGHTS, name, err) from err


def compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], name: str) -> None:
    """Make sure that the tensors found are those that the config asks for, and are numbers.

    Raises:
        UserError: A tensor is missing, too many, of another shape or type, or not finite.
    """
    lacks, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if lacks or extra:
        raise UserError(
            f"The weights of {name} do not fit its {CONFIG}: missing {lacks[:4] or 'none'}, "
            f"unexpected {extra[:4] or 'none'}. Restore the files, or fit the lens again."
        )
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape or not tensor.is_floating_point():
            raise UserError(
                f"{key} of {name} is {tuple(tensor.shape)} {tensor.dtype}; its {CONFIG} asks for "
                f"floating-point numbers of shape {tuple(expected[key].shape)}. Restore the "
                "files, or fit the lens again."
            )
    finite(found, name)


def finite(tensors: Mapping[str, Tensor], name: str) -> None:
    """Refuse weights that are not numbers.

    Raises:
        UserError: Names the first such tensor.
    """
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{key} of {name} holds NaN or infinity. Fit the lens again.")


def _fetch(name: str | Path, file: str, hub: dict[str, Any]) -> Path:
    """Find one file of a lens, in a folder or on the Hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / file).is_file():
            return folder / file
        found = sorted(p.name for p in folder.iterdir())
        pickled = any(Path(other).suffix in _PICKLES for other in found)
        raise UserError(
            f"The folder {name} holds no {file} (found: {', '.join(found[:6]) or 'nothing'}). "
            + (_NO_PICKLE if pickled else "Give the folder or hub id of a lens.")
        )
    try:
        return Path(hf_hub_download(str(name), file, **hub))
    except HFValidationError as err:
        raise UserError(
            f"lens={name} is neither a folder nor a hub id. Give the folder that save_pretrained() "
            "wrote, or an id such as user/lens."
        ) from err
    except LocalEntryNotFoundError as err:
        raise UserError(
            f"lens={name}: there is no such folder; {file} of that hub id is not in the local "
            "cache, and the Hub cannot be reached (offline?). Check the path, or download the lens "
            "while online."
        ) from err
    except EntryNotFoundError as err:
        raise UserError(
            f"The hub repository {name} holds no {file}. "
            + (_NO_PICKLE if file == WEIGHTS else "Give the folder or hub id of a lens.")
        ) from err
    except RevisionNotFoundError as err:
        raise UserError(
            f"The hub repository {name} has no revision {hub.get('revision')!r}. Give a branch, "
            "tag or commit that it has."
        ) from err
    except RepositoryNotFoundError as err:
        raise UserError(
            f"lens={name}: there is neither such a folder nor such a hub repository, or it is "
            "private or gated. Check the name, or log in with `hf auth login`."
        ) from err
    except OSError as err:
        raise UserError(f"lens={name}: {file} cannot be read: {err}. Try again later.") from err


def _tuned_lens(raw: dict[str, Any], path: Path, name: str) -> tuple[LensConfig, dict[str, Tensor]]:
    """Read a lens of the tuned-lens package (0.2.0): the same residual form.

    Its module i reads the input of layer i + 1, which is our h^i; module 0 reads the embedding.
    Keys are `0.weight` (d, d), `0.bias` (d,), and so on up to L - 1.

    Args:
        raw: Its config.json.
        path: Its params.pt.
        name: The lens, for messages.
    """
    kind = raw.get("lens_type", "linear_tuned_lens")
    if kind != "linear_tuned_lens":
        raise UserError(f"{name} is a tuned lens of type {kind!r}; only linear ones can be read.")
    n_layers: Any = raw.get("num_hidden_layers")
    try:
        config = LensConfig(
            decoder="tuned_lens",
            base_model=raw["base_model_name_or_path"],
            revision=raw.get("base_model_revision"),
            n_layers=n_layers,
            width=raw["d_model"],
            layers=tuple(range(n_layers)) if isinstance(n_layers, int) else (),
            teacher="model",
        )
    except UserError as err:
        raise UserError(f"{CONFIG} of {name} holds a wrong value: {err}") from err
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # a damaged pickle raises whatever it likes
        raise _damaged(PARAMS, name, err) from err
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{PARAMS} of {name} holds something else than tensors by name.")
    # Some versions put the name of the module list in front.
    tensors = {re.sub(r"^(?:.*\.)?(\d+\.\w+)$", r"layers.\1", str(k)): v for k, v in state.items()}
    if not raw.get("bias", True):
        for layer in config.layers:
            tensors.setdefault(f"layers.{layer}.bias", torch.zeros(config.width))
    return config, tensors


def _damaged(file: str, name: str | Path, err: Exception) -> UserError:
    reason = str(err).strip().partition("\n")[0]
    return UserError(
        f"{file} of {name} is damaged or not what its name says ({type(err).__name__}: {reason}). "
        "Copy or download it again, or fit the lens again."
    )
