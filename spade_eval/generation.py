"""Generate text with exits: the decoding loop that a model's own `generate` runs for us.

transformers prepares what it always does (prompts, logits processors, stopping criteria) and hands
over to our loop, which differs from its own in one step: where the next token's logits come from.

    generate(input_ids, ...) -> transformers -> loop: Sequences.step -> logits -> next token
                                                  ^                                |
                                                  +--------------------------------+
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, StopStringCriteria

from spade_eval import checks
from spade_eval.backfill import Sequences, Step, Work
from spade_eval.decoders import LogitLens
from spade_eval.errors import UnsupportedModelError, UserError
from spade_eval.exits import ExitRule
from spade_eval.lens import LinearLens
from spade_eval.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import GenerationConfig

    from spade_eval.backbone import Backbone
    from spade_eval.batching import Ints

# Arguments of `generate` that ask for another loop, or for what ours does not keep; with the values
# that do not.
REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "assistant_model": (None,),
    "assistant_early_exit": (None,),
    "prompt_lookup_num_tokens": (None,),
    "use_mtp": (None, False),
    "guidance_scale": (None, 1, 1.0),
    "inputs_embeds": (None,),
    "cache": (None,),
    "past_key_values": (None,),
    "custom_generate": (None,),
    "synced_gpus": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}


@dataclass(frozen=True)
class Generated:
    """What happened to B prompts.

    Attributes:
        tokens: The new tokens of each, without padding.
        exit_layers: The layer that each of them was read at; L where there was no exit.
        confidence: The last value measured for each; NaN where none was.
        prompt_lengths: Tokens of each prompt, (B,).
        work: What each cost.
    """

    tokens: list[list[int]]
    exit_layers: list[list[int]]
    confidence: list[list[float]]
    prompt_lengths: Ints
    work: Work

    def add(self, rows: Ints, tokens: Tensor, step: Step) -> None:
        """Note the tokens, (B',), that a step gave to some rows, (B',)."""
        news = zip(tokens.tolist(), step.layers.tolist(), step.confidence.tolist(), strict=True)
        for row, (token, layer, value) in zip(rows.tolist(), news, strict=True):
            self.tokens[row].append(token)
            self.exit_layers[row].append(layer)
            self.confidence[row].append(value)


def generate(
    backbone: Backbone, policy: Policy, window: int | None = None, **kwargs: Any
) -> tuple[Any, Generated]:
    """Generate with a policy's exits.

    Args:
        backbone: The model.
        policy: Where tokens may be read.
        window: Tokens that the model takes, prompt and answer together; None does not check.
        **kwargs: Arguments of the model's own `generate`.

    Returns:
        What `generate` returns, and what happened.

    Raises:
        UserError: An argument that this loop does not honour, an empty or right-padded prompt, or
            one that is too long.
    """
    refuse(kwargs)
    tokenizer, strings = kwargs.pop("tokenizer", None), kwargs.pop("stop_strings", None)
    if strings is not None:
        # transformers keeps the tokenizer, which they need, from loops that are not its own.
        if tokenizer is None:
            raise UserError(f"stop_strings={strings!r} needs tokenizer=... beside it.")
        given = kwargs.pop("stopping_criteria", None) or []
        also = StopStringCriteria(tokenizer, strings)
        kwargs["stopping_criteria"] = StoppingCriteriaList([*given, also])
    loop = _Loop(backbone, policy, window, kwargs.get("streamer"))
    output = backbone.model.generate(**kwargs, custom_generate=loop)
    return output, loop.generated


def refuse(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of `generate` that ask for what the loop does not do.

    Raises:
        UserError: Names the argument.
    """
    for name, value in arguments.items():
        if name not in REFUSED or any(value is ok or value == ok for ok in REFUSED[name]):
            continue
        shown = value if isinstance(value, (int, float, str)) else type(value).__name__
        raise UserError(
            f"{name}={shown}: generation with exits is greedy or samples, token by token and with "
            f"caches of its own. Leave {name} out, or generate with the model itself (--model hf)."
        )


@torch.no_grad()
def check(backbone: Backbone) -> None:
    """Make sure that this model's keys and values can be filled in late.

    Raises:
        UnsupportedModelError: They cannot, or it keeps no cache that ours can stand in for.
    """
    if not backbone.keeps_keys:
        raise UnsupportedModelError(
            f"{backbone.name} keeps more than keys and values (a recurrent state, say), which "
            "cannot be filled in late: no text from inner layers, nor with exits. It can be "
            "scored; generate with --model hf."
        )
    if failed := checks.failure(_late, backbone):
        found, cause = failed
        raise UnsupportedModelError(
            f"{backbone.name} cannot generate with exits: keys and values that are filled in late "
            f"must be the model's own ({found}). It can be scored; generate with --model hf."
        ) from cause


def _late(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Two left-padded rows exit half-way twice; the next token takes everything to the last layer.

    Returns:
        The logits of that token and of one more behind it, and the model's own.
    """
    n_layers = backbone.n_layers
    ids = checks.probe_ids(backbone)[:, [0, 1, 2, 1, 0, 2]]
    rows = torch.cat([ids, ids.roll(1, 1)])  # (2, 6); the second begins behind padding
    lens = LinearLens.identity(n_layers, backbone.width)
    always = Policy((n_layers // 2, n_layers), LogitLens(), ExitRule(math.inf), lens)
    sequences = Sequences(backbone, always, np.array([3, 2]))
    for end in (3, 4):
        sequences.step(rows[:, :end])
    sequences.policy = replace(always, rule=ExitRule(-1.0))
    ours = [sequences.step(rows[:, :end]).logits for end in (5, 6)]
    theirs = [
        _full_depth(backbone, row) for end in (5, 6) for row in (rows[:1, :end], rows[1:, 1:end])
    ]
    return torch.cat(ours), torch.cat(theirs)


@torch.no_grad()
def _full_depth(backbone: Backbone, ids: Tensor) -> Tensor:
    """The model's logits at the last of the tokens (1, T), (1, V)."""
    return backbone.logits(backbone.hidden_states(ids)[-1][:, -1].to(backbone.device))


class _Loop:
    """The loop, for one call of `generate`."""

    generated: Generated

    def __init__(self, backbone: Backbone, policy: Policy, window: int | None, streamer: Any):
        self.backbone, self.policy = backbone, policy
        self.window, self.streamer = window, streamer

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **kwargs: Any,  # transformers hands over what it shares with its own loop by these alone
    ) -> Any:
        """Decode until every row has finished; what transformers calls in place of its own loop."""
        config = generation_config
        refuse({name: getattr(config, name, None) for name in REFUSED})
        lengths = _lengths(input_ids, kwargs.get("attention_mask"))
        self._fits(lengths, config.max_length - input_ids.shape[1])
        sequences = Sequences(self.backbone, self.policy, lengths)
        rows, pad = len(input_ids), config._pad_token_tensor
        self.generated = Generated(*_empty(rows), lengths, sequences.work)
        scores: tuple[Tensor, ...] = ()
        raw: tuple[Tensor, ...] = ()
        unfinished = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
        while unfinished.any():
            at = torch.from_numpy(sequences.origin).to(input_ids.device)
            step = sequences.step(input_ids[at])
            found = step.logits.to(input_ids.device, torch.float32)  # (B', V)
            # Processors and the sampler see all rows, as in transformers' own loop.
            logits = found.new_zeros(rows, found.shape[-1]).index_copy_(0, at, found)
            processed = logits_processor(input_ids, logits)  # (B, V)
            if config.return_dict_in_generate:
                scores += (processed,) * bool(config.output_scores)
                raw += (logits,) * bool(config.output_logits)
            if config.do_sample:
                chosen = torch.multinomial(processed.softmax(-1), num_samples=1)[:, 0]  # (B,)
            else:
                chosen = processed.argmax(-1)
            if pad is not None:
                chosen = torch.where(unfinished, chosen, pad.to(chosen.device))
            input_ids = torch.cat([input_ids, chosen[:, None]], -1)
            if self.streamer is not None:
                self.streamer.put(chosen.cpu())
            self.generated.add(sequences.origin, chosen[at], step)
            unfinished = unfinished & ~stopping_criteria(input_ids, scores or None)
            still = unfinished[at].cpu().numpy()
            if pad is not None and still.any() and not still.all():
                sequences.keep(np.flatnonzero(still))
        if self.streamer is not None:
            self.streamer.end()
        if not config.return_dict_in_generate:
            return input_ids
        return GenerateDecoderOnlyOutput(
            sequences=input_ids, scores=scores or None, logits=raw or None
        )

    def _fits(self, lengths: Ints, new: int) -> None:
        longest = int(lengths.max())
        require_one_range(self.backbone, lengths, new)
        if self.window is not None and longest + new > self.window:
            raise UserError(
                f"A prompt has {longest} tokens and up to {new} are to follow (max_new_tokens), "
                f"but {self.backbone.name} takes {self.window} in all. Shorten the prompt or "
                "generate fewer tokens."
            )


def switch(backbone: Backbone) -> int:
    """Tokens beyond which a text has other rotary frequencies (longrope); no bound elsewhere."""
    rope = getattr(backbone.model.config.get_text_config(), "rope_parameters", None) or {}
    parts = (rope, *(own for own in rope.values() if isinstance(own, dict)))
    at = [p["original_max_position_embeddings"] for p in parts if p.get("rope_type") == "longrope"]
    return min(at, default=sys.maxsize)


def require_one_range(backbone: Backbone, lengths: Ints, new: int) -> None:
    """Refuse texts that would begin with one set of rotary frequencies and end with the other.

    The keys before the switch are of no use behind it; and the longest text of a batch decides for
    all of them.

    Args:
        backbone: The model.
        lengths: Tokens of each prompt of a batch.
        new: Tokens that are to follow, at most.

    Raises:
        UserError: Names the length.
    """
    limit = switch(backbone)
    shorter, longer = lengths + new - 1 <= limit, lengths > limit
    if not (shorter | longer).all():
        raise UserError(
            f"A prompt has {lengths[~(shorter | longer)][0]} tokens and up to {new} are to follow, "
            f"and {backbone.name} (longrope) reads texts of more than {limit} tokens in another "
            "way than shorter ones: what is kept of the prompt would not fit. Generate fewer "
            "tokens, or with the model itself (--model hf)."
        )
    if shorter.any() and longer.any():
        raise UserError(
            f"Prompts of {lengths.min()} and {lengths.max()} tokens: {backbone.name} (longrope) "
            f"reads texts of more than {limit} tokens in another way than shorter ones, and all of "
            "a batch alike. Generate them apart."
        )


def _empty(rows: int) -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
    """Lists for tokens, layers and confidences of each row."""
    return [[] for _ in range(rows)], [[] for _ in range(rows)], [[] for _ in range(rows)]


def _lengths(input_ids: Tensor, attention_mask: Tensor | None) -> Ints:
    """Tokens of each prompt, (B,).

    Raises:
        UserError: A prompt is empty, or its padding does not stand on the left.
    """
    rows, width = input_ids.shape
    if attention_mask is None:
        lengths = np.full(rows, width)
    else:
        real = attention_mask.bool().cpu().numpy()
        lengths = real.sum(1)
        holes = real[:, 1:] < real[:, :-1]
        if holes.any() and lengths.all():
            row = int(np.flatnonzero(holes.any(1))[0])
            raise UserError(
                f"attention_mask: prompt {row} has padding behind its tokens; pad on the left "
                "(tokenizer.padding_side = 'left')."
            )
    if width == 0 or not lengths.all():
        row = int(np.flatnonzero(lengths == 0)[0]) if width else 0
        raise UserError(
            f"Prompt {row} is empty: generation needs a token to begin with. Give it one, the BOS "
            "token for instance."
        )
    return lengths
