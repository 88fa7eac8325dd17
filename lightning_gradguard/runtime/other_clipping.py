"""Clipping by the Trainer or the module, beside that of the suite."""

from __future__ import annotations

import functools
import inspect
import re
from types import FunctionType, MethodType

import pytorch_lightning as pl
from torch.optim import Optimizer

from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.lightning_packages import is_instance_by_name

#: Functions that clip, of a module and of torch, by which code of the user's own clips.
_CLIPPERS = {"clip_gradients", "clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_"}
#: Code that bounds a gradient in place, also one that has a name; not that which bounds weights.
_BOUNDS_GRADIENTS = re.compile(
    r"\.grad(\.data)?\.clamp_\(|\b(\w+) = [^\n=]*\.grad\n.*?\b\2(\.data)?\.clamp_\(", re.DOTALL
)


def suite_clips(trainer: pl.Trainer) -> bool:
    """True if the Trainer has an `AdaptiveGradientClipping`."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return any(is_instance_by_name(callback, "AdaptiveGradientClipping") for callback in callbacks)


def clip_norm(trainer: pl.Trainer) -> float | None:
    """Returns the norm to which the Trainer itself clips; `None` if it does not, or clips otherwise."""
    by_value = trainer.gradient_clip_algorithm == "value"
    if not trainer.gradient_clip_val or by_value or _hook_that_clips(trainer):
        return None
    return float(trainer.gradient_clip_val)


def describe_other_clipper(trainer: pl.Trainer) -> str:
    """Returns the clipping that follows that of the suite, in words; empty if there is none."""
    if hook := _hook_that_clips(trainer):
        return f"{type(trainer.lightning_module).__name__}.{hook}"
    if trainer.gradient_clip_val:
        how = " by value" if clip_norm(trainer) is None else ""
        return f"gradient_clip_val={trainer.gradient_clip_val:g}{how} of the Trainer"
    return ""


def clips_otherwise(trainer: pl.Trainer) -> bool:
    """True if gradients are clipped after the suite, and not to a known norm."""
    return bool(describe_other_clipper(trainer)) and clip_norm(trainer) is None


def allow_steps_without_gradients(trainer: pl.Trainer) -> None:
    """Lets the Trainer clip a skipped step by value, at which torch raises: it has no gradient."""
    plugin = trainer.precision_plugin
    clip = plugin.clip_grad_by_value

    @functools.wraps(clip)
    def clip_present(optimizer: Optimizer, clip_val: int | float) -> None:
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            clip(optimizer, clip_val)

    vars(plugin)["clip_grad_by_value"] = clip_present


def restore_clipping(trainer: pl.Trainer) -> None:
    """Undoes `allow_steps_without_gradients`."""
    vars(trainer.precision_plugin).pop("clip_grad_by_value", None)


def clips_in_code(pl_module: pl.LightningModule) -> bool:
    """True if a method of the module calls a function that clips, as under manual optimization."""
    functions = (value for owner in type(pl_module).__mro__ for value in vars(owner).values())
    return any(map(_clips, functions))


def _clips(function: object) -> bool:
    """True if a function of the user's own calls one that clips, or bounds gradients in place."""
    function = _undecorated(function)
    if (
        not inspect.isfunction(function)
        or (function.__module__ or "").split(".")[0] in lightning_api.PACKAGES
    ):
        return False
    if function.__name__ in _CLIPPERS or not _CLIPPERS.isdisjoint(function.__code__.co_names):
        return True
    if "clamp_" not in function.__code__.co_names:
        return False
    try:
        return _BOUNDS_GRADIENTS.search(inspect.getsource(function)) is not None
    except OSError:  # code without a file
        return False


def _hook_that_clips(trainer: pl.Trainer) -> str:
    """Returns the hook in which the module clips after the suite; empty if there is none."""
    module, name = trainer.lightning_module, "configure_gradient_clipping"
    if lightning_api.overrides(module, name):
        return name
    name = "on_before_optimizer_step"
    if not lightning_api.overrides(module, name):
        return ""
    hook = _undecorated(getattr(module, name))
    if not inspect.isfunction(hook):
        return ""
    known = {**hook.__globals__, **vars(module)}
    called = (getattr(type(module), used, known.get(used)) for used in hook.__code__.co_names)
    return name if any(map(_clips, (hook, *called))) else ""


def _undecorated(function: object) -> object:
    """Returns a function without what binds or decorates it; anything else as it is."""
    if isinstance(function, (classmethod, staticmethod, MethodType)):
        function = function.__func__
    is_function = isinstance(function, (FunctionType, functools._lru_cache_wrapper))
    return inspect.unwrap(function) if is_function else function  # type: ignore[arg-type]
