"""A model is loaded and checked, and texts become its tokens.

Nearly all of it is HFLM's: weights, tokenizer, chat template, devices, ranks, PEFT, quantisation.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from spade_eval.backbone import Backbone
from spade_eval.default_model import DEFAULT_MODEL_NAME, default_model_path
from spade_eval.errors import UnsupportedModelError, UserError, raised_by
from spade_eval.lm import arguments
from spade_eval.lm.ahead import Ahead, encodes_alike, texts_of
from spade_eval.memory import keep_freed_blocks

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_LOADERS = ("transformers", "huggingface_hub", "tokenizers", "safetensors", "accelerate", "gguf")


class LoadedLM(HFLM):
    """A decoder-only Hugging Face model that can be read from its middle.

    Args:
        pretrained: Hub id, folder or model; None takes the default model
            (`spade_eval.default_model`).
        **kwargs: HFLM's arguments.

    Raises:
        UserError: A bad argument; an `UnsupportedModelError` if the model cannot be decoded from
        its middle.
    """

    def __init__(self, pretrained: Any = None, **kwargs: Any):
        # HFLM's own default is a GPU, whether there is one or not.
        kwargs.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        arguments.check_values(kwargs)
        keep_freed_blocks()
        kwargs |= arguments.dtypes(kwargs)
        self._given = kwargs
        if pretrained is None:
            self._model_source, pretrained = DEFAULT_MODEL_NAME, str(default_model_path())
        elif isinstance(pretrained, (str, Path)):
            self._model_source = pretrained = str(pretrained)
        else:
            self._model_source = pretrained.config._name_or_path or type(pretrained).__name__
            if kwargs.get("peft"):
                raise UserError(
                    "peft= is for models that are loaded here. Put the adapter on the model "
                    "(peft.PeftModel.from_pretrained) and pass the result as pretrained."
                )
        try:
            super().__init__(pretrained=pretrained, **kwargs)
        except (OSError, ValueError, ImportError) as err:
            # A bug of ours keeps its traceback.
            if not isinstance(err, OSError) and not raised_by(err, _LOADERS):
                raise
            raise arguments.not_loaded(self._model_source, kwargs, err) from err
        if self.add_bos_token and self.tokenizer.bos_token_id is None:
            raise UserError(
                f"add_bos_token=True, but the tokenizer of {self._model_source} has no BOS token. "
                "Leave it out: the start token is then the first token of each prompt."
            )
        if self.prefix_token_id is None:
            raise UserError(
                f"The tokenizer of {self._model_source} has neither a BOS nor an EOS token to "
                "stand in for an empty context. Pass prefix_token_id=ID."
            )
        self.backbone = Backbone(self.model)
        self._encode = lru_cache(maxsize=8)(super().tok_encode)
        self._ahead: Ahead | None = None

    def _check_config(self, n_layers: int) -> None:
        """Check own arguments against a model of `n_layers`, before its weights are loaded."""

    def _get_backend(self, config: Any, *args: Any, **kwargs: Any) -> None:
        # HFLM calls this when the config is known and no weight is loaded yet.
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{self._model_source} is an encoder-decoder model ({config.model_type}); the "
                "decoders read a decoder-only model. Give a causal language model."
            )
        own = set(inspect.signature(type(self).__init__).parameters) - {"self", "kwargs"}
        remote = bool(self._given.get("trust_remote_code") and getattr(config, "auto_map", None))
        arguments.check_names(type(self).__name__, self._given, own, config, remote)
        n_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
        if n_layers is not None:
            self._check_config(n_layers)
        super()._get_backend(config, *args, **kwargs)

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        name, revision = kwargs.get("peft"), kwargs.get("revision")
        if not name:
            return super()._create_model(*args, **kwargs)
        from spade_eval import adapters  # with PEFT, which takes seconds to load

        config = adapters.load_config(name, revision)
        try:
            super()._create_model(*args, **kwargs)
            adapters.require_own(self._model, name, revision)
        except Exception as err:  # PEFT's have many types
            if getattr(self, "_model", None) is None:  # the model itself was not loaded
                raise
            raise adapters.misfit(name, config, self._model_source, err) from err

    # ------------------------------------------------------------------ token ids

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, *args: Any, **kwargs: Any
    ) -> list[int]:
        """As in HFLM, but in blocks where texts are known ahead; elsewhere the last few are kept.

        A context is asked for with each of its choices.
        """
        if args or kwargs:
            return super().tok_encode(string, add_special_tokens, *args, **kwargs)
        if self._ahead is not None and add_special_tokens is None:
            return list(self._ahead.get(string))
        return list(self._encode(string, add_special_tokens))

    @contextmanager
    def _encoding_ahead(self, pairs: Iterable[tuple[str, str]]) -> Iterator[None]:
        """Encode these contexts and continuations in blocks, if the tokenizer gains from it."""
        if encodes_alike(self.tokenizer):
            bos = self.tokenizer.decode(self.prefix_token_id)
            self._ahead = Ahead(texts_of(pairs), self.tokenizer, super().tok_encode, bos)
        try:
            yield
        finally:
            self._ahead = None

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if not context_ids:  # a context of blanks only, which moved into the continuation
            return [self.prefix_token_id], continuation_ids
        return self._with_bos(context_ids), continuation_ids

    def _with_bos(self, ids: list[int]) -> list[int]:
        # Many tokenizers ignore add_bos_token; a chat template may have put the token there.
        bos = self.tokenizer.bos_token_id
        return [bos, *ids] if self.add_bos_token and ids[0] != bos else ids

    def context_ids(self, context: str) -> list[int]:
        """The tokens that generation begins with, at least one.

        HFLM's generation looks for the text of the BOS token, its scoring for that of the prefix.
        """
        special = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        if self.tokenizer.bos_token and context.startswith(self.tokenizer.bos_token):
            special = {"add_special_tokens": False}
        ids = self.tokenizer.encode(context, truncation=self.truncation, **special)
        return self._with_bos(ids or [self.prefix_token_id])
