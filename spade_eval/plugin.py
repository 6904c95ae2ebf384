"""Makes the plain `lm_eval` command know our models once the package is installed.

lm-eval 0.4.13 knows its own models only; later releases read the `lm_eval.models` entry points
that pyproject.toml declares. This start-up hook bridges the gap. `spade_eval.pth` (on Python 3.15
and later `spade_eval.start`, PEP 829) calls `install` whenever Python starts; `install` waits for
`lm_eval.models` to be imported and then adds our names to the registry, as "module:Class" strings
that nothing imports before they are asked for. A name that the registry already holds is left
alone, so the hook does nothing under an lm-eval that finds the entry points by itself.

Opt out: set SPADE_EVAL_NO_AUTOLOAD=1 (`spade-eval run` knows the models without the hook).
Delete the hook and its two start-up files once the minimum lm-eval discovers entry points.

Every Python start pays for this module, so it imports only what the interpreter has loaded by then.
"""

import os
import sys

TYPE_CHECKING = False  # see spade_eval/__init__.py
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# The one list of our model names; pyproject.toml repeats it as entry points, a test compares them.
# Version 2 of the paper calls SPADE SimLens, L-SPADE Linear SimLens and SPADE-EXIT SimExit.
MODELS = {
    "spade_layer": "spade_eval.lm.layer:SpadeLayerLM",
    "simlens": "spade_eval.lm.layer:SpadeLayerLM",
    "logit_lens": "spade_eval.lm.layer:LogitLensLM",
    "l_spade": "spade_eval.lm.layer:LSpadeLM",
    "linear_simlens": "spade_eval.lm.layer:LSpadeLM",
    "tuned_lens": "spade_eval.lm.layer:TunedLensLM",
    "spade_exit": "spade_eval.lm.exit:SpadeExitLM",
    "simexit": "spade_eval.lm.exit:SpadeExitLM",
    "lens_exit": "spade_eval.lm.exit:LensExitLM",
}

_OPT_OUT = "SPADE_EVAL_NO_AUTOLOAD"
_TARGET = "lm_eval.models"


def register() -> None:
    """Add our models to lm-eval's registry, next to its own."""
    # The built-in models go first: lm-eval loads them only into an empty registry.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    for name, target in MODELS.items():
        if name not in model_registry:
            model_registry.register(name, target=target)


def install() -> None:
    """Have `register` run right after `lm_eval.models` is imported; called when Python starts."""
    if os.environ.get(_OPT_OUT, "") not in ("", "0"):
        return
    if _TARGET in sys.modules:
        _register_or_warn()
    elif _WaitForLmEval not in sys.meta_path:
        sys.meta_path.insert(0, _WaitForLmEval)


def _register_or_warn() -> None:
    """Register, but never break the program that happens to import lm-eval."""
    try:
        register()
    except Exception as err:
        import warnings

        warnings.warn(
            f"spade_eval could not add its models to lm_eval ({err!r}); `spade-eval run` may "
            f"still know them, and {_OPT_OUT}=1 turns this attempt off",
            RuntimeWarning,
            stacklevel=2,
        )


class _WaitForLmEval:
    """One-shot import hook: finds nothing itself, acts once `lm_eval.models` has been executed."""

    @classmethod
    def find_spec(
        cls,
        name: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        """Return the spec the other finders give for `lm_eval.models`, with our step behind it."""
        if name != _TARGET:
            return None
        for finder in sys.meta_path:
            if finder is cls or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                cls._follow(spec)
                return spec
        return None

    @classmethod
    def _follow(cls, spec: "ModuleSpec") -> None:
        """Make executing the module of `spec` end with our registration."""
        if spec.loader is None:
            return
        execute = spec.loader.exec_module

        def execute_then_register(module: "ModuleType") -> None:
            execute(module)
            if cls in sys.meta_path:
                sys.meta_path.remove(cls)
            _register_or_warn()

        # On the loader object of this one import; the loader's class stays as it is.
        spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
