"""What `spade-eval fit` is asked for, and the checks that need no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from spade_eval import lens_files
from spade_eval.arguments import layer_numbers
from spade_eval.atomic import require_replaceable
from spade_eval.errors import UserError
from spade_eval.fit import work
from spade_eval.fit.descent import Recipe

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class FitSettings:
    """What to fit.

    Attributes:
        decoder: "l_spade" is taught by SPADE, "tuned_lens" by the full model.
        output: Folder of the lens.
        tasks: lm-eval tasks that give the documents; or
        text: a file that does.
        split: Of the tasks.
        layers: Layers that get a map; None takes the even ones. As text, see `layer_list`.
        positions: "all" positions after the first, or those that read the "answer".
        max_positions: Positions to train on, at most.
        rank: Rank of the maps; None for full ones.
        epochs: Passes over the positions, at most.
        seed: Of documents, positions and their order.
        dtype: Of the saved maps: "float32", or "bfloat16" at half the size.
    """

    decoder: Literal["l_spade", "tuned_lens"]
    output: Path
    tasks: tuple[str, ...] = ()
    text: Path | None = None
    split: str = "train"
    layers: str | None = None
    positions: Literal["all", "answer"] = "all"
    max_positions: int = 12_000
    rank: int | None = None
    epochs: int = Recipe.epochs
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def work(self) -> Path:
        """The folder of a run that has not ended."""
        output = self.output.absolute()  # "." has no name
        return output.parent / f".{output.name}.fit"


def layer_list(text: str | None, n_layers: int) -> list[int]:
    """Read `--layers`: "8:32:2" (from, below, step), "4,8,12" or "all"; None is "2:L:2".

    Raises:
        UserError: Not of this form, or not within 0..L-1.
    """
    if text == "all":
        return list(range(n_layers))
    found = list(range(2, n_layers, 2)) if text is None else sorted(set(layer_numbers(text)))
    if not found or not 0 <= min(found) <= max(found) < n_layers:
        raise UserError(
            f"layers={text!r} names layers {found or 'none'}; this model takes maps at "
            f"0..{n_layers - 1} (layer {n_layers} is the model itself)."
        )
    return found


def check_output(settings: FitSettings, resume: bool, overwrite: bool) -> None:
    """Refuse to overwrite a lens or half of one, before anything is loaded.

    Raises:
        UserError: Says what is there and what to do.
    """
    work.require_free(settings.output, settings.work, resume, overwrite)
    require_replaceable(settings.output, "lens", lens_files.FILES.__contains__)
