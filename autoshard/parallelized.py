"""What does `parallelize` give back?  A function that plans at the first call for each form.

The form of a call is the structure of its arguments with shapes and dtypes, and the values of the
static ones. Inside another transformation of jax (grad, vmap, an outer jit) there is nothing to
place, and the function is what it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from autoshard.jit_options import Options, check_arguments, static_places


class Parallelized:
    """A function that runs as planned on the devices jax has.

    fn: as it was. options: those of `jax.jit`, and the hints. make: from the function, its
    arguments and keyword arguments to a Plan.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        options: Options,
        hints: Mapping[str, Any],
        make: Callable[..., Any],
    ) -> None:
        if not callable(fn):
            raise TypeError(f"parallelize takes a function, not {type(fn).__name__} {fn!r:.60}")
        functools.update_wrapper(self, fn)
        self.fn, self.options, self.hints = fn, options, hints
        self._make = make
        self._plans: dict[Any, Any] = {}
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run fn as planned; traced by jax, fn itself."""
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, kwargs))):
            return self.fn(*args, **kwargs)
        key = self._key(args, kwargs)
        if key not in self._compiled:
            self._compiled[key] = self.plan(*args, **kwargs).compile()
        args, kwargs = self._dynamic(args, kwargs)
        return self._compiled[key](*args, **kwargs)

    def of(self, fn: Callable[..., Any]) -> Parallelized:
        """The same for another function with the same arguments."""
        return Parallelized(fn, self.options, self.hints, self._make)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """As a method it takes its instance first; make that static if it is no pytree."""
        return self if instance is None else _Method(self, instance)

    def __repr__(self) -> str:
        return f"<parallelized {self.fn!r}>"

    def plan(self, *args: Any, **kwargs: Any) -> Any:
        """The Plan for these arguments, made once per form."""
        key = self._key(args, kwargs)
        if key not in self._plans:
            self._plans[key] = self._make(self, args, kwargs)
        return self._plans[key]

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """The lowered program for these arguments, on the devices jax has."""
        lowered: jax.stages.Lowered = self.plan(*args, **kwargs).lower()
        return lowered

    def _dynamic(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        numbers, names = static_places(self.fn, self.options, len(args))
        return (
            tuple(a for i, a in enumerate(args) if i not in numbers),
            {k: v for k, v in kwargs.items() if k not in names},
        )

    def _key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        numbers, names = static_places(self.fn, self.options, len(args))
        static = (
            *((i, a) for i, a in enumerate(args) if i in numbers),
            *((k, kwargs[k]) for k in sorted(names & kwargs.keys())),
        )
        leaves, tree = jax.tree.flatten(self._dynamic(args, kwargs))
        key = tree, tuple(map(_form, leaves)), tuple((k, type(v), v) for k, v in static)
        try:
            hash(key)
        except TypeError:
            check_arguments(self.fn, args, kwargs, self.options)
            raise
        return key


@dataclass(frozen=True, slots=True)
class _Method:
    """A parallelized function looked up on an instance, which becomes its first argument."""

    step: Parallelized
    instance: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.step(self.instance, *args, **kwargs)

    def plan(self, *args: Any, **kwargs: Any) -> Any:
        """The Plan for these arguments."""
        return self.step.plan(self.instance, *args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """The lowered program for these arguments."""
        return self.step.lower(self.instance, *args, **kwargs)


def _form(leaf: Any) -> Any:
    """What jit distinguishes of an argument: numpy's 64 bit types are what jax makes of them."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        dtype = leaf.dtype
        if not isinstance(leaf, jax.Array) and getattr(dtype, "kind", "O") in "biufc":
            dtype = jax.dtypes.canonicalize_dtype(dtype)
        return tuple(leaf.shape), str(dtype), bool(getattr(leaf, "weak_type", False))
    return type(leaf)
