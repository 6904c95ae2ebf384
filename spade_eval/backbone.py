"""Any Hugging Face decoder-only model, layer by layer, through the model's own code.

A decoder of an intermediate layer needs three things of a model: the states after layer l, the
layers above l on a sequence of its own choice, and the final norm with the head. None of them
needs a copy of a forward pass. The layers sit in one `nn.ModuleList`; while probes stand in its
place, a call of the model's decoder embeds the tokens, builds its masks and rotary embeddings, and
hands every layer its arguments, but computes no layer. The probes keep the arguments, and we run
the real layers on them:

    ids (B, T) -> embed: h^0 (B, T, d) and each layer's arguments -> advance: h^l -> logits (P, V)

Such a hollow pass costs about a millisecond. Whether a model may be driven like this is not a
question of its name: `Backbone` runs the four checks of `spade_eval.checks` when it is made.
"""

from __future__ import annotations

import inspect
import sys
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spade_eval import checks
from spade_eval.errors import UnsupportedModelError, UserError
from spade_eval.forests import sees
from spade_eval.hollow import (
    Lane,
    Probe,
    find_layers,
    head_places,
    hollow,
    narrow_head,
    probes,
    unwrap_peft,
)
from spade_eval.start import StartStates, StartStore
from spade_eval.tail import send

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel

LOGITS_BYTES = 256 * 2**20  # logits alive at once on a GPU: larger products are the faster ones
# On a CPU, larger blocks come from the system anew each time, a rule of the C library, and touching
# their pages takes about as long as the arithmetic. It bounds logits and the widest activations.
CPU_BYTES = 32 * 2**20


class Backbone:
    """A causal language model opened between its layers.

    Args:
        model: A `transformers` causal language model, or a PEFT model around one. It is used as it
            is: its device, dtype, attention implementation and adapters apply. If its weights or
            active adapters change later, call `starts.clear()`.

    Attributes:
        model: The model.
        n_layers: L.
        width: d.
        vocab_size: V, the width of the model's logits.
        state_dtype: Of the states; some models keep them in fp32 beside weights of half precision.
        keeps_keys: True if all that a start token leaves to later ones are keys and values, which
            are stored. Where layers are recurrent, a two-token tail computes both of its tokens.
        positions_inert: True if the position of the answer token has no effect on a two-token tail
            (ALiBi, positions added to the embedding).
        packs: True if a row may hold several branches behind one shared context (explicit
            positions and 4D mask).
        operations: Operations of a layer's matrix products per token.
        crossover: Number of keys at which attention costs a token as much as the layer's matrix
            products.

    Raises:
        UnsupportedModelError: The model is not decoder-only, or fails a check that decoding needs.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.name = type(unwrap_peft(model)).__name__
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{self.name} is an encoder-decoder model; the decoders read a decoder-only model. "
                "Use a causal language model (AutoModelForCausalLM)."
            )
        self._place = find_layers(model, self.name)
        self._layers = self._place.layers
        self._head_places = head_places(model)
        parameters = inspect.signature(self._place.decoder.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._cache_name = next((n for n in ("cache", "past_key_values") if n in parameters), None)
        self.n_layers = len(self._layers)

        if model.training:
            raise UserError(f"{self.name} is in training mode, with dropout: call eval() first.")
        if any(c.is_prompt_learning for c in getattr(model, "peft_config", {}).values()):
            raise UnsupportedModelError(
                f"{self.name} has a prompt-learning adapter, whose virtual tokens have no ids."
            )
        self.width, self.vocab_size, tuple_size, self.state_dtype = checks.measure(self)
        self._probes = probes(self._layers, tuple_size)
        self.starts = StartStore(self._compute_starts)
        self.keeps_keys = True  # unless a check says otherwise
        self.positions_inert, self.packs = checks.run(self)
        self.starts.clear()  # those of the checks: scoring may run under autocast, in another dtype
        # Attention takes 4 * d operations per token and key. Under a mask it runs at about a third
        # of the speed of matrix products (measured on CPU).
        self.operations = checks.operations(self)
        self.crossover = self.operations / (12 * self.width)

    # ------------------------------------------------------------------ one pass, layer by layer

    def embed(
        self,
        ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
    ) -> Lane:
        """Let the model embed the tokens and prepare every layer's arguments, but run no layer.

        Args:
            ids: Token ids, (B, T). Right padding needs no mask: attention is causal.
            position_ids: (B, T); the model's own 0..T-1 if absent.
            attention_mask: (B, T_all) of ones and zeros, or an additive (B, 1, T, T_all) mask.
            cache: Keys and values of earlier tokens; layers read it and update it as they run.

        Returns:
            The lane at depth 0.
        """
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": cache is not None}
        if position_ids is not None and self._takes_positions:
            inputs["position_ids"] = position_ids
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        if cache is not None:
            if self._cache_name is None:
                raise UnsupportedModelError(f"{self.name} keeps no key/value cache.")
            inputs[self._cache_name] = cache
        with self._hollow() as passed:
            self._place.decoder(**inputs)
            calls = [probe.call for probe in passed if probe.call is not None]
            h = passed[0].states
        if h is None or len(calls) < self.n_layers:
            raise UnsupportedModelError(
                f"{self.name} calls {len(calls)} of its {self.n_layers} layers."
            )
        return Lane(h.to(torch.promote_types(h.dtype, self.state_dtype)), 0, calls)

    def additive_mask(self, ends: Tensor) -> Tensor:
        """The additive mask (B, 1, T, T) of rows of trees whose subtrees end at `ends` (B, T)."""
        dtype = self.model.dtype
        mask = torch.zeros(*ends.shape, ends.shape[1], dtype=dtype, device=ends.device)
        return mask.masked_fill_(~sees(ends), torch.finfo(dtype).min)[:, None]

    def advance(self, lane: Lane, to: int) -> Lane:
        """Run the lane, in place, through the layers up to and including layer `to`."""
        for layer in range(lane.depth, to):
            lane.h = lane.calls[layer](self._layers[layer], lane.h)
        lane.depth = max(lane.depth, to)
        return lane

    def hidden_states(self, ids: Tensor) -> list[Tensor]:
        """All states h^0..h^L, L + 1 tensors (B, T, d); h^L is taken before the final norm."""
        return self._climb(self.embed(ids))

    def logits(self, h: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The model's own final norm, head, soft-cap and scaling: head(norm(h)).

        Args:
            h: States in the space of the last layer, (P, d). Callers bound P: the result holds P *
                V numbers.
            tokens: The columns wanted, (C,); the head computes no others if it `narrows`.

        Returns:
            Logits (P, V), or (P, C), in the model's dtype.
        """
        if tokens is not None:
            places = self._head_places if self.narrows else ()
            with narrow_head(self.model, places, tokens) as narrowed:
                logits = self.logits(h)
            narrowed = narrowed and logits.shape[1] == len(tokens)
            return logits if narrowed else logits[:, tokens.to(logits.device)]
        ids = torch.zeros(len(h), 1, dtype=torch.long, device=self.device)
        mask = torch.ones_like(ids)  # without one, some models warn that id 0 may be padding
        with self._hollow(h[:, None]):  # (P, 1, d)
            out = self.model(input_ids=ids, attention_mask=mask, use_cache=False)
        return out.logits[:, 0]  # (P, V)

    @cached_property
    @torch.no_grad()
    def narrows(self) -> bool:
        """Whether the head can be computed at some of the vocabulary alone.

        If not (it is adapted, quantised, or its weights come and go with hooks), `logits` computes
        the whole head and drops what was not asked for.
        """
        generator = torch.Generator().manual_seed(0)
        h = torch.randn(1, self.width, generator=generator).to(self.device, self.state_dtype)
        # Both ends of the vocabulary and some between, backwards: what follows the head may treat
        # columns apart, by their number.
        every, end = torch.arange(self.vocab_size), min(64, self.vocab_size // 4)
        some = torch.cat([every[:end], every[end:-end:997], every[-end:]]).flip(0)
        with narrow_head(self.model, self._head_places, some) as narrowed:
            if not narrowed:
                return False
            try:
                ours = self.logits(h)
            except Exception:  # code that counts on all columns
                return False
        theirs = self.logits(h)[:, some.to(ours.device)]
        same = ours.shape == theirs.shape
        return same and checks.distance(ours, theirs) <= checks.tolerance(theirs)

    def logits_rows(self, dtype: torch.dtype) -> int:
        """Rows whose logits in `dtype` fit the memory bound, at least one."""
        held = CPU_BYTES if self.device.type == "cpu" else LOGITS_BYTES
        return max(1, held // (self.vocab_size * dtype.itemsize))

    @property
    def most_tokens(self) -> int:
        """Tokens beyond which a batch only gets slower; without bound on a GPU."""
        if self.device.type != "cpu":
            return sys.maxsize
        # The widest activation is taken to have 4 d numbers per token.
        return max(512, CPU_BYTES // (4 * self.width * self.model.dtype.itemsize))

    # ------------------------------------------------------------------ the two-token tail

    def start_states(self, start_ids: Tensor) -> StartStates:
        """States of start tokens, and keys and values, each computed once and then kept.

        They depend on the start token alone, since attention is causal (the third check).

        Args:
            start_ids: (P,).
        """
        return self.starts.get(start_ids)

    def tail(
        self,
        h: Tensor,
        layer: int | Tensor,
        token_ids: Tensor,
        positions: Tensor,
        start_ids: Tensor | None,
    ) -> Tensor:
        """Send the pairs [start, token] through their remaining layers and read the token (eq. 6).

        The start token's keys and values come from the store, so one token per pair is computed,
        not two, if the model keeps keys at all. Pairs of different layers join on the way up: each
        layer runs once for all of them.

        Args:
            h: States of the answer tokens after `layer`, (P, d).
            layer: l, from 0 to L; one for all, or one for each, (P,), on the CPU.
            token_ids: The answer tokens, (P,).
            positions: Position ids of the answer tokens, (P,); the start token stands at 0.
            start_ids: The start token of each pair, (P,); None sends every token on alone
                (SPADE-NoS).

        Returns:
            (P, d): the answer tokens' states after layer L, before the final norm.
        """
        return send(self, h, layer, token_ids, positions, start_ids)

    # ------------------------------------------------------------------ inside

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device on which the input embedding runs."""
        embedding = self.model.get_input_embeddings()
        device = next(embedding.parameters()).device
        if device.type != "meta":
            return device
        # Offloaded by accelerate, which loads the weights when the module is called.
        return torch.device(getattr(embedding._hf_hook, "execution_device", "cpu"))

    @torch.no_grad()
    def _compute_starts(self, ids: Tensor) -> tuple[Tensor, Any]:
        """States h^0..h^L of single tokens (U, L+1, d), and the cache that they filled, if any."""
        from transformers import DynamicCache

        cache = DynamicCache() if self.keeps_keys else None
        mask = torch.ones(len(ids), 1, dtype=torch.long, device=ids.device)
        zeros = torch.zeros_like(ids)[:, None]
        lane = self.embed(ids[:, None], position_ids=zeros, attention_mask=mask, cache=cache)
        states = [h[:, 0].to(ids.device) for h in self._climb(lane)]
        return torch.stack(states, 1), cache

    def _climb(self, lane: Lane) -> list[Tensor]:
        """The states of a lane at depth 0 there and after each layer."""
        return [lane.h] + [self.advance(lane, layer).h for layer in range(1, self.n_layers + 1)]

    def _hollow(self, output: Tensor | None = None) -> AbstractContextManager[list[Probe]]:
        return hollow(self._place, self._probes, output)
