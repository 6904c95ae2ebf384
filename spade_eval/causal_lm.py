"""SPADE-EXIT as a model that generates, for use in Python."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from spade_eval import lenses
from spade_eval.backbone import Backbone
from spade_eval.decoders import Decoder, Linear, Positions, Spade
from spade_eval.default_model import default_model_path
from spade_eval.errors import UserError
from spade_eval.exits import ExitRule, Readout
from spade_eval.generation import Generated, check, generate
from spade_eval.policy import Policy

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from spade_eval.confidence import Name
    from spade_eval.lens import LinearLens


class SpadeExitForCausalLM:
    """A causal language model whose tokens exit where its lens is confident (Algorithm 1).

    Args:
        model: A `transformers` causal language model, in evaluation mode.
        threshold: T. A token exits at the first candidate layer where its confidence reaches it:
            entropies from above, in nats (-1: never), probabilities from below (2: never).
        lens: Folder, hub id, a `LinearLens`, or "identity" for the logit lens.
        interval: Candidates are the layers that it divides and that have a map,
        min_layer: from this one on; half of the layers by default.
        confidence: "entropy", "top2_margin" or "max_prob".
        readout: "spade" answers with the two-token tail, "lens" with the map itself.
        positions: Of the tail's pairs: "reset" to [0, 1], or "keep" [0, i].
        force_lens: Whether a lens of another model, of the same size, is a warning only.

    Attributes:
        model: The model.
        backbone: The same, open between its layers.
        policy: Where its tokens may exit.
        last_run: What the last call of `generate` did; None before the first.

    Raises:
        UserError: A bad argument; an `UnsupportedModelError` if the model cannot generate with
            exits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        threshold: float,
        lens: str | Path | LinearLens,
        interval: int = 2,
        min_layer: int | None = None,
        confidence: Name = "entropy",
        readout: Readout = "spade",
        positions: Positions = "reset",
        force_lens: bool = False,
    ):
        rule = ExitRule(threshold, confidence, interval, min_layer, readout=readout)
        spade = Spade(positions=positions)
        loaded = lenses.load(lens, False, type(self).__name__)
        self.model = model
        self.backbone = Backbone(model)
        check(self.backbone)
        fitted = lenses.fit_to(loaded, self.backbone, lenses.called(lens), force_lens)
        decoder: Decoder = Linear(fitted) if readout == "lens" else spade
        self.policy = Policy.exits(self.backbone.n_layers, decoder, rule, fitted)
        self.last_run: Generated | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        *,
        threshold: float,
        lens: str | Path | LinearLens | None = None,
        **kwargs: Any,
    ) -> SpadeExitForCausalLM:
        """Load a model and its lens.

        Args:
            pretrained_model_name_or_path: Hub id or folder; None takes the default model
                (`spade_eval.default_model`), which brings a lens.
            threshold: T.
            lens: As in the constructor; None takes the default model's own.
            **kwargs: Further arguments of the constructor, and those of
                `AutoModelForCausalLM.from_pretrained`.

        Raises:
            UserError: There is no such model or lens, or an argument is bad.
        """
        from transformers import AutoModelForCausalLM

        own = inspect.signature(cls).parameters
        settings = {name: kwargs.pop(name) for name in list(kwargs) if name in own}
        name = pretrained_model_name_or_path
        if lens is None and name is not None:
            raise UserError(
                f"lens is missing: give the folder or hub id of a lens for {name}, or "
                "lens='identity' for the logit lens."
            )
        folder = default_model_path() if name is None else name
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
        except OSError as err:
            raise UserError(f"{folder} cannot be loaded: {err}") from err
        lens = lenses.DEFAULT_LENS if lens is None else lens
        return cls(model.eval(), threshold=threshold, lens=lens, **settings)

    def generate(self, inputs: Any = None, **kwargs: Any) -> Any:
        """As the model's own `generate`, greedy or sampling, with exits.

        Args:
            inputs: Prompts, (B, T), left-padded; `input_ids=` will do.
            **kwargs: Arguments of `transformers`' `generate`: `attention_mask`, `max_new_tokens`,
                `do_sample`, `stopping_criteria`, `streamer`, ...

        Returns:
            What it returns: token ids (B, T + new), or with `return_dict_in_generate=True` an
            object that holds them.

        Raises:
            UserError: An argument that exits do not go with, such as `num_beams`, an empty prompt,
                one that is padded on the right, or one that is too long.
        """
        if inputs is not None:
            kwargs["inputs"] = inputs
        config = self.model.config.get_text_config()
        window = getattr(config, "max_position_embeddings", None)
        output, self.last_run = generate(self.backbone, self.policy, window, **kwargs)
        return output

    @property
    def last_exits(self) -> list[list[int]]:
        """The exit layer of each new token of each row in the last call of `generate`; L for none.

        Raises:
            UserError: There was none.
        """
        if self.last_run is None:
            raise UserError("Nothing has been generated yet: call generate(...) first.")
        return self.last_run.exit_layers
