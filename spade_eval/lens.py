"""Linear maps that carry states of an inner layer into the space of the last one.

    F_l(h) = h + A_l h + b_l        h^l (P, d) -> (P, d), to be read by the model's norm and head

L-SPADE fits them to SPADE's output (arXiv 2507.17618, eq. 7 and 8), the tuned lens to the full
model's (Belrose et al., 2023, arXiv 2303.08112). Zero weights are the logit lens. A saved lens is a
folder of `model.safetensors`, `config.json` and a model card; folders of the PyPI package
`tuned-lens` are read too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from spade_eval import lens_files
from spade_eval.atomic import replacing_folder
from spade_eval.errors import UserError
from spade_eval.lens_config import LensConfig, card

Weight = Tensor | tuple[Tensor, Tensor]


class LinearLens(nn.Module, PyTorchModelHubMixin):
    """One affine map per layer; all zero, and so the logit lens, when it is made.

    Args:
        config: What the lens is. With a rank, both factors of each A_l start at zero, where their
            gradients vanish: give them values by `set_map` before training them by descent.

    Attributes:
        config: The same.
        layers: The maps by layer, as text: `layers["24"].weight` (d, d), or `.up` (d, r) and
            `.down` (r, d), and `.bias` (d,).
    """

    def __init__(self, config: LensConfig):
        super().__init__()
        self.config = config
        mapped = () if config.decoder == "identity" else config.layers
        self.layers = nn.ModuleDict({str(n): _Map(config.width, config.rank) for n in mapped})

    @classmethod
    def identity(cls, n_layers: int, width: int) -> LinearLens:
        """The lens without parameters, at every layer: the logit lens.

        Args:
            n_layers: L.
            width: d.
        """
        return cls(LensConfig("identity", "", n_layers, width, tuple(range(n_layers))))

    @property
    def available(self) -> tuple[int, ...]:
        """The layers that the lens can carry states from; L, where F_L is the identity, is last."""
        return (*self.config.layers, self.config.n_layers)

    def forward(self, h: Tensor, layer: int) -> Tensor:
        """F_l(h) = h + A_l h + b_l (eq. 7), in the dtype and on the device of `h`.

        A map that is stored otherwise is converted at every call; `lens.to(model.dtype)`, once,
        saves that.

        Args:
            h: States after `layer`, (P, d); any leading dimensions will do.
            layer: l, one of `available`.

        Returns:
            States in the last layer's space, in the shape of `h`.

        Raises:
            UserError: The layer has no map.
        """
        if layer not in self.available:
            raise UserError(
                f"The lens for {self.config.base_model} has no map for layer {layer}; it has "
                f"{', '.join(map(str, self.available))}."
            )
        if str(layer) not in self.layers:
            return h
        return h + self.layers[str(layer)](h)

    def set_map(self, layer: int, weight: Weight, bias: Tensor) -> None:
        """Set A_l and b_l; values keep the dtype and device that the lens has.

        Args:
            layer: l, one of `config.layers`.
            weight: A_l, (d, d), of which a lens with a rank takes the best approximation
                (`low_rank`); or for such a lens the factors, (d, r) and (r, d).
            bias: b_l, (d,).

        Raises:
            UserError: The layer has no map, or a tensor has another shape.
        """
        if str(layer) not in self.layers:
            raise UserError(
                f"Layer {layer} takes no map; this lens takes them for {', '.join(self.layers)}."
            )
        target = self.layers[str(layer)]
        rank, d = self.config.rank, self.config.width
        if rank is not None and isinstance(weight, Tensor):
            weight = low_rank(weight, rank)
        names = ("weight",) if isinstance(weight, Tensor) else ("up", "down")
        values = (weight,) if isinstance(weight, Tensor) else weight
        given = dict(zip((*names, "bias"), (*values, bias), strict=True))
        shapes = {name: tuple(value.shape) for name, value in given.items()}
        wanted = {name: tuple(value.shape) for name, value in target.named_parameters()}
        if shapes != wanted:
            raise UserError(f"The map of layer {layer} (d={d}) is {wanted}; {shapes} was given.")
        target.load_state_dict(given)

    # ------------------------------------------------------------------ files and the Hub

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write the lens's folder: weights, config and card, all of them or none.

        Args:
            save_directory: The folder; one that holds a lens is replaced.
            config: Not used: the lens has its own.
            repo_id: With `push_to_hub`, the repository; the folder's name by default.
            push_to_hub: Whether to upload the lens too.
            model_card_kwargs: Not used: the card tells what the config tells.
            **push_to_hub_kwargs: Arguments of `push_to_hub`.

        Returns:
            The commit's address if it was uploaded.

        Raises:
            UserError: The folder holds other files or cannot be written, a weight is not a
                number, or this is the identity.
        """
        if self.config.decoder == "identity":
            raise UserError("The identity has no weights to save: write lens=identity to use it.")
        lens_files.finite(self.state_dict(), "this lens")
        owns = lens_files.FILES.__contains__
        with replacing_folder(Path(save_directory), "lens", owns) as folder:
            super().save_pretrained(folder)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or Path(save_directory).name, **push_to_hub_kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        weights = save_directory / lens_files.WEIGHTS
        save_file(tensors, weights, metadata={"format": "pt"})
        config = save_directory / lens_files.CONFIG
        config.write_text(json.dumps(self.config.to_json(), indent=2) + "\n", encoding="utf-8")
        # safetensors writes for the owner alone; lenses are shared.
        weights.chmod(config.stat().st_mode)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card that is saved beside the weights: use, training data, command, metrics."""
        return ModelCard(card(self.config))

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the mixin takes any keyword and ignores it
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> LinearLens:
        """Load a lens, in the dtype it was saved in.

        Args:
            pretrained_model_name_or_path: A folder that `save_pretrained` or the tuned-lens
                package wrote, or a hub id of such.
            force_download: Whether to download what is in the cache already.
            token: The Hub's token, for private repositories.
            cache_dir: The Hub's cache folder.
            local_files_only: Whether to take what is in the cache.
            revision: Branch, tag or commit on the Hub.

        Raises:
            UserError: There is no such lens, or its files are damaged.
        """
        config, tensors = lens_files.read(
            pretrained_model_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        with torch.device("meta"):
            lens = cls(config)
        lens_files.compare(lens.state_dict(), tensors, str(pretrained_model_name_or_path))
        lens.load_state_dict(tensors, assign=True)
        return lens.eval()


class _Map(nn.Module):
    """h -> A h + b, zero when it is made."""

    def __init__(self, width: int, rank: int | None):
        super().__init__()
        self.rank = rank
        if rank is None:
            self.weight = nn.Parameter(torch.zeros(width, width))
        else:
            self.up = nn.Parameter(torch.zeros(width, rank))
            self.down = nn.Parameter(torch.zeros(rank, width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor) -> Tensor:
        """(P, d) to (P, d)."""
        if self.rank is None:
            return affine(h, self.weight.to(h), self.bias.to(h))
        return affine(h, (self.up.to(h), self.down.to(h)), self.bias.to(h))


def affine(h: Tensor, weight: Weight, bias: Tensor) -> Tensor:
    """A h + b.

    Args:
        h: (P, d).
        weight: A, (d, d), or its factors, (d, r) and (r, d).
        bias: b, (d,).

    Returns:
        (P, d).
    """
    if isinstance(weight, Tensor):
        return linear(h, weight, bias)
    up, down = weight
    return linear(linear(h, down), up, bias)


def low_rank(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix by a product of rank r (Eckart and Young, 1936).

    Args:
        weight: (d, d).
        r: The rank, from 1 to d.

    Returns:
        up (d, r) and down (r, d), weight being close to up @ down; of equal norms, so that
        neither loses more than the other in a narrow dtype.

    Raises:
        UserError: The rank is out of range.
    """
    if not 1 <= r <= min(weight.shape):
        raise UserError(f"rank={r} is out of range: a map {tuple(weight.shape)} has 1..d.")
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    root = s[:r].sqrt()
    return (u[:, :r] * root).to(weight.dtype), (root[:, None] * vh[:r]).to(weight.dtype)
