"""What is known about a set of linear maps: `config.json` of a saved lens, and its model card."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from huggingface_hub import ModelCardData

from spade_eval import __version__
from spade_eval.default_model import DEFAULT_MODEL_NAME
from spade_eval.errors import UserError, require_known

if TYPE_CHECKING:
    from collections.abc import Iterable

Kind = Literal["l_spade", "tuned_lens", "identity"]
Teacher = Literal["spade", "model"]
PairPositions = Literal["reset", "keep"]
Scope = Literal["all", "answer"]

_CHOICES = {
    "decoder": get_args(Kind),
    "teacher": get_args(Teacher),
    "positions_mode": get_args(PairPositions),
    "positions": get_args(Scope),
}
_LEAST = {"n_layers": 1, "width": 1, "documents": 0, "n_positions": 0, "tokens": 0, "seed": 0}
# Files may lack these: a lens is not refused for what is unknown of its model.
_OPTIONAL = {"head_rows", "layers_fingerprint", "adapter_scaling"}


@dataclass(frozen=True)
class LensConfig:
    """Everything that one needs to trust a lens, and to make it again.

    Raises:
        UserError: A value that no lens can have.
    """

    decoder: Kind
    """"identity", the logit lens, has no parameters; it is made by name and never saved."""
    base_model: str
    """Hub id or folder of the model that the maps belong to."""
    n_layers: int
    """L."""
    width: int
    """d."""
    layers: tuple[int, ...]
    """The layers that have a map, 0 <= l < L, ascending."""
    rank: int | None = None
    """r, if each A_l is a product of (d, r) and (r, d); None if it is full."""
    revision: str | None = None
    """The base model's revision on the Hub."""
    fingerprint: str = ""
    """Hash of its final norm and head (`spade_eval.fingerprint`); empty if unknown."""
    head_rows: int | None = None
    """How many rows its head had; None if unknown."""
    layers_fingerprint: str = ""
    """Hash of its layers, without adapters; empty if unknown."""
    adapter: str | None = None
    """Hash of its active PEFT adapters; None without."""
    adapter_scaling: str | None = None
    """Hash of their factors; None without or if unknown."""
    teacher: Teacher = "spade"
    """Whose output the maps were fitted to: SPADE's, or the full model's."""
    positions_mode: PairPositions = "reset"
    """Position ids of SPADE's pairs: [0, 1] or [0, i]."""
    positions: Scope = "all"
    """Which token positions they were fitted on."""
    tasks: tuple[str, ...] = ()
    """lm-eval tasks or text files that gave the training text."""
    split: str = ""
    """The split of the data."""
    documents: int = 0
    """How many documents were read."""
    n_positions: int = 0
    """How many positions the maps were fitted on."""
    tokens: int = 0
    """How many tokens the model read for it."""
    seed: int = 0
    """Seed of the choice of documents and positions."""
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    """Per layer, what was measured, held-out losses above all."""
    bill: dict[str, Any] = field(default_factory=dict)
    """What the fit cost, seconds and memory, and the machine."""
    command: str = ""
    """The command that made the lens."""
    package_version: str = __version__
    """The version of spade_eval that made it."""

    def __post_init__(self) -> None:
        for name, valid in _CHOICES.items():
            require_known(name, getattr(self, name), valid)
        for name, least in _LEAST.items():
            if not _is_int(value := getattr(self, name), least):
                raise UserError(f"{name}={value!r} is not an integer of at least {least}.")
        if not (
            all(_is_int(layer, 0) and layer < self.n_layers for layer in self.layers)
            and list(self.layers) == sorted(set(self.layers))
        ):
            raise UserError(
                f"layers={self.layers!r} are not ascending layers within 0..{self.n_layers - 1}."
            )
        if self.rank is not None and not (_is_int(self.rank, 1) and self.rank <= self.width):
            raise UserError(f"rank={self.rank!r} is not an integer within 1..{self.width}.")
        if self.head_rows is not None and not _is_int(self.head_rows, 1):
            raise UserError(f"head_rows={self.head_rows!r} is not an integer of at least 1.")
        for name in ("base_model", "fingerprint", "layers_fingerprint"):
            if not isinstance(value := getattr(self, name), str):
                raise UserError(f"{name}={value!r} is not a text.")

    def to_json(self) -> dict[str, Any]:
        """The config as JSON knows it: lists for tuples, texts for the layers that are keys."""
        metrics = {str(layer): values for layer, values in self.metrics.items()}
        lists = {"layers": list(self.layers), "tasks": list(self.tasks)}
        return {**asdict(self), **lists, "metrics": metrics}

    @classmethod
    def from_json(cls, raw: object, name: str) -> LensConfig:
        """Read what `to_json` wrote.

        Args:
            raw: The parsed file.
            name: The lens, for messages.

        Raises:
            UserError: It is not the config of a lens; says what is missing, unknown or wrong.
        """
        if not isinstance(raw, dict):
            raise UserError(f"config.json of {name} is not a JSON object but {str(raw)[:40]!r}.")
        known = [f.name for f in fields(cls)]
        missing, unknown = _few(set(known) - _OPTIONAL - raw.keys()), _few(raw.keys() - set(known))
        if missing or unknown:
            raise UserError(
                f"config.json of {name} is not that of a lens of spade_eval {__version__}: "
                + "; ".join(
                    f"{what} {found}"
                    for what, found in (("it lacks", missing), ("unknown are", unknown))
                    if found
                )
                + ". Give a folder or hub id that holds a lens (a model goes to pretrained=), or "
                "use the package version that wrote it."
            )
        try:
            tuples = {"layers": tuple(raw["layers"]), "tasks": tuple(raw["tasks"])}
            metrics = {int(layer): dict(values) for layer, values in raw["metrics"].items()}
            return cls(**{**raw, **tuples, "metrics": metrics})
        except (AttributeError, TypeError, ValueError) as err:
            raise UserError(
                f"config.json of {name} holds a wrong value: {str(err).rstrip('.')}. Restore the "
                "file, or fit the lens again."
            ) from err


def card(config: LensConfig) -> str:
    """The model card of a lens, Markdown with its YAML head."""
    head = ModelCardData(
        library_name="spade_eval",
        base_model=hub_id(config.base_model),
        tags=["spade_eval", config.decoder, "early-exit"],
    )
    teacher = "SPADE's output" if config.teacher == "spade" else "the full model's output"
    shape = "full rank" if config.rank is None else f"rank {config.rank}"
    default = config.base_model == DEFAULT_MODEL_NAME  # needs no pretrained=
    arguments = "" if default else f"pretrained={config.base_model},"
    arguments += f"revision={config.revision}," if config.revision else ""
    arguments += "peft=ADAPTER," if config.adapter else ""
    example = config.layers[-1] if config.layers else config.n_layers
    revision = f", revision {config.revision}" if config.revision else ""
    keys = list(dict.fromkeys(key for values in config.metrics.values() for key in values))
    rows = [
        [layer, *(values.get(key, "") for key in keys)]
        for layer, values in sorted(config.metrics.items())
    ]
    return f"""---
{head.to_yaml()}
---

# Linear maps for {config.base_model}

One affine map per layer, F_l(h) = h + A_l h + b_l ({shape}), fitted to {teacher}
([arXiv 2507.17618](https://arxiv.org/abs/2507.17618), eq. 7; tuned lens:
[arXiv 2303.08112](https://arxiv.org/abs/2303.08112)). The model's own norm and head read F_l(h) of
layer l: an answer without the layers above it.

{
        table(
            ["", ""],
            [
                ["base model", config.base_model + revision],
                [
                    "layers with a map",
                    f"{', '.join(map(str, config.layers))} of 0..{config.n_layers}",
                ],
                ["width", config.width],
                ["fingerprint of norm and head", config.fingerprint or "unknown"],
                ["fingerprint of the layers", config.layers_fingerprint or "unknown"],
                ["adapter", config.adapter or "none"],
                ["made by", f"spade_eval {config.package_version}"],
            ],
        )
    }

## Use

    lm_eval --model {config.decoder} \\
            --model_args {arguments}lens=LENS,layer={example} \\
            --tasks arc_easy

LENS is this repository's id or a folder with its files. In Python:

    from spade_eval.lens import LinearLens

    lens = LinearLens.from_pretrained("LENS")
    aligned = lens(h, layer={example})  # (P, {
        config.width
    }), to be read by the model's norm and head

## Training

{
        table(
            ["", ""],
            [
                ["data", ", ".join(config.tasks)],
                ["split", config.split],
                ["documents", config.documents],
                ["positions", f"{config.n_positions} ({config.positions})"],
                ["positions of the pairs", config.positions_mode],
                ["tokens read by the model", config.tokens],
                ["seed", config.seed],
                *config.bill.items(),
            ],
        )
    }

The command:

{chr(10).join("    " + line for line in config.command.splitlines())}

## Measured

{table(["layer", *keys], rows) if rows else "Nothing."}
"""


def hub_id(base_model: str) -> str | None:
    """A model's id on the Hub, which refuses others in a card; None for a folder's or our own."""
    whole = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model)
    return base_model if whole and base_model != DEFAULT_MODEL_NAME else None


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; numbers with four digits."""
    lines = [list(head)]
    lines += [["---"] * len(lines[0]), *map(list, rows)]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _few(names: Iterable[str]) -> str:
    """The first names, in order, for a message."""
    ordered = sorted(names)
    return ", ".join(ordered[:6]) + (f" and {len(ordered) - 6} more" if len(ordered) > 6 else "")
