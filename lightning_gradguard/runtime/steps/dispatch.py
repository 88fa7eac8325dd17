"""The hooks of a batch, each of which Lightning calls in a context: none in vain, and one for neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import pytorch_lightning as pl

from lightning_gradguard.runtime.lightning_api import Callback
from lightning_gradguard.runtime.lightning_packages import is_instance_by_name

START, END = "on_train_batch_start", "on_train_batch_end"
HOOKS = (
    START,
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    END,
)
Hook = Callable[..., None]


class _Joint:
    """Calls the hooks of neighbours in turn."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._hooks = hooks

    def __call__(self, *arguments: Any, **named: Any) -> None:
        for hook in self._hooks:
            hook(*arguments, **named)


class _Start:
    """Calls the first hooks of a batch of neighbours, for one of two that look for changes of the list.

    Args:
        hooks: Those of all neighbours for the first of the two, none for the second.
        callbacks: The list as it was when the neighbours were joined.
        on_change: Called in place of the hooks once the list is another.
    """

    def __init__(self, hooks: Sequence[Hook], callbacks: Sequence[Any], on_change: Hook) -> None:
        self._hooks, self._callbacks, self._on_change = hooks, list(callbacks), on_change

    def __call__(self, trainer: pl.Trainer, *arguments: Any, **named: Any) -> None:
        if trainer.callbacks == self._callbacks:  # type: ignore[attr-defined]
            for hook in self._hooks:
                hook(trainer, *arguments, **named)
        else:
            self._on_change(trainer, *arguments, **named)


def join(trainer: pl.Trainer, members: Sequence[object], of_first: Hook) -> None:
    """Has Lightning call one hook for members that are neighbours in its list, and none that does nothing.

    No other callback has its turn between neighbours, and hooks that a subclass overrides are called. What a
    profiler shows is left as it is. The first hook of a batch is called for two of them, to find out if the
    list has changed: neighbours without two such hooks are not joined, as either may be removed.

    Args:
        trainer: It passes over a hook that is `None`.
        members: Those in the list of the Trainer are joined: others are called by one of the user's.
        of_first: A hook that does nothing but for the first member.
    """
    for member in members:
        separate(member)
    callbacks, ids = _unprofiled(trainer), set(map(id, members))
    for is_member, group in groupby(callbacks, lambda callback: id(callback) in ids):
        neighbours = list(group) if is_member else []
        # a hook on an object is the user's own
        is_plain = not any(name in vars(callback) for callback in neighbours for name in HOOKS)
        acting = {name: _acting(neighbours, name, of_first, members[0]) for name in HOOKS}
        for name, those in acting.items():
            hooks = [getattr(callback, name) for callback in those]
            for callback in neighbours:
                if callback not in those:
                    vars(callback).setdefault(name, None)
            if len(acting[START]) < 2 or not is_plain:
                continue
            for callback in those:
                vars(callback)[name] = None
            if name == START:
                for callback, called in ((those[0], hooks), (those[1], ())):
                    on_change = partial(_part, members, of_first, those, callback)
                    vars(callback)[name] = _Start(called, callbacks, on_change)
            elif those:
                vars(those[0])[name] = _Joint(hooks)


def _part(
    members: Sequence[object],
    of_first: Hook,
    neighbours: Sequence[Any],
    caller: object,
    trainer: pl.Trainer,
    *arguments: Any,
    **named: Any,
) -> None:
    """Starts a batch in which the list has changed: each hook is called by itself until the end of the batch.

    Lightning is at the caller in its list, and has passed over its neighbours up to there.
    """
    for member in members:
        separate(member)
    callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
    walked = callbacks if caller in callbacks else neighbours  # of another list, Lightning walks the former
    for callback in walked[: walked.index(caller) + 1]:
        if callback in neighbours:
            getattr(callback, START)(trainer, *arguments, **named)
    rejoin = lambda *_, **__: join(trainer, members, of_first)  # noqa: E731
    for last in [callback for callback in callbacks if callback in members][-1:]:
        vars(last).setdefault(END, _Joint([getattr(last, END), rejoin]))


def pass_over(trainer: pl.Trainer, callback: Callback, kind: type[Callback]) -> None:
    """Has Lightning pass over the hooks of a callback, but those that a subclass of its kind overrides."""
    if any(callback is other for other in _unprofiled(trainer)):
        for name in HOOKS:
            if getattr(type(callback), name) is getattr(kind, name):
                vars(callback).setdefault(name, None)


def separate(callback: object) -> None:
    """Has Lightning call each hook of a callback again."""
    for name in vars(callback).keys() - own_attributes(callback).keys():
        del vars(callback)[name]


def _acting(callbacks: Sequence[Any], name: str, of_first: Hook, first: object) -> list[Any]:
    """Returns the callbacks whose hook of this name does something."""
    kinds = [getattr(type(callback), name) for callback in callbacks]
    return [
        callback
        for callback, hook in zip(callbacks, kinds, strict=True)
        if hook is not getattr(Callback, name) and (hook is not of_first or callback is first)
    ]


def _unprofiled(trainer: pl.Trainer) -> Sequence[Any]:
    """Returns the callbacks of a Trainer; none if a profiler shows each of their hooks."""
    is_profiled = not is_instance_by_name(trainer.profiler, "PassThroughProfiler")  # type: ignore[attr-defined]
    return () if is_profiled else trainer.callbacks  # type: ignore[attr-defined]


def own_attributes(callback: object) -> dict[str, Any]:
    """Returns the attributes of a callback, without what takes the place of its hooks."""
    return {
        name: value
        for name, value in vars(callback).items()
        if name not in HOOKS or not (value is None or isinstance(value, (_Joint, _Start)))
    }
