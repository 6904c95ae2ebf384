"""Early-exit decoders of the SPADE paper as lm-evaluation-harness models.

Every Python start in an environment with spade_eval runs this file (the start-up hook in
`spade_eval.plugin` needs its package), so it imports nothing: public names load on first use.
"""

__version__ = "0.1.0"

_LAZY = {
    "Backbone": "spade_eval.backbone",
    "LinearLens": "spade_eval.lens",
    "logit_lens": "spade_eval.decoders",
    "spade": "spade_eval.decoders",
    "spade_nos": "spade_eval.decoders",
    "LSpadeLM": "spade_eval.lm.layer",
    "LensExitLM": "spade_eval.lm.exit",
    "LogitLensLM": "spade_eval.lm.layer",
    "SpadeExitForCausalLM": "spade_eval.causal_lm",
    "SpadeExitLM": "spade_eval.lm.exit",
    "SpadeLayerLM": "spade_eval.lm.layer",
    "TunedLensLM": "spade_eval.lm.layer",
}

__all__ = [
    "Backbone",
    "LSpadeLM",
    "LensExitLM",
    "LinearLens",
    "LogitLensLM",
    "SpadeExitForCausalLM",
    "SpadeExitLM",
    "SpadeLayerLM",
    "TunedLensLM",
    "__version__",
    "logit_lens",
    "spade",
    "spade_nos",
]

TYPE_CHECKING = False  # type checkers know this name; importing it from `typing` costs milliseconds
if TYPE_CHECKING:
    from spade_eval.backbone import Backbone
    from spade_eval.causal_lm import SpadeExitForCausalLM
    from spade_eval.decoders import logit_lens, spade, spade_nos
    from spade_eval.lens import LinearLens
    from spade_eval.lm.exit import LensExitLM, SpadeExitLM
    from spade_eval.lm.layer import LogitLensLM, LSpadeLM, SpadeLayerLM, TunedLensLM


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the lazy names too, for tab completion."""
    return sorted({*globals(), *__all__})
