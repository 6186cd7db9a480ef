"""When kernels are compiled: once per machine, and kept on disk. What they compute is `loops`."""

from collections.abc import Callable
from threading import Lock
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = {"error_model": "numpy", "nogil": True}


def inlined(function: F) -> F:
    """A function for use inside kernels; its machine code becomes part of theirs."""
    return cast(F, numba.njit(error_model="numpy")(function))


class Kernel:
    """A Numba function with one signature, compiled on first use and then kept on disk.

    Numba's own lazy dispatch would compile again, unasked, for every new combination of argument types (a
    read-only array is one). This compiles for the one signature it was declared with and refuses others.

    The cache lies in `__pycache__` beside the source; if that cannot be written, in the user's cache
    directory (or in NUMBA_CACHE_DIR); if there is no place at all, each process compiles for itself.
    """

    def __init__(self, function: Callable[..., None], signature: tuple[Any, ...]) -> None:
        self._signature = signature
        self._is_loaded = False
        self._loading = Lock()
        try:
            self._dispatcher = numba.njit(cache=True, **_OPTIONS)(function)
        except RuntimeError:  # "cannot cache function: no locator available"
            self._dispatcher = numba.njit(**_OPTIONS)(function)

    def __call__(self, *args: object) -> None:
        """Run, after loading or compiling if this is the first use in this process. Releases the GIL."""
        if not self._is_loaded:
            self.load()
        self._dispatcher(*args)

    def load(self) -> None:
        """Load from the cache or, failing that, compile (about a second) and cache."""
        with self._loading:
            if self._is_loaded:
                return
            try:
                self._dispatcher.compile(self._signature)
            except OSError:  # a full disk costs the cache, not the run
                if not self._dispatcher.overloads:
                    raise
            self._dispatcher.disable_compile()
            self._is_loaded = True

    def is_compiled(self) -> bool:
        """Whether the next call runs at once: loaded, or cached for this source and processor."""
        if self._is_loaded:
            return True
        # Numba has no public question for this; the cache of a dispatcher without one answers None.
        cached = self._dispatcher._cache.load_overload(self._signature, self._dispatcher.targetctx)
        return cached is not None


def kernel(*signature: Any) -> Callable[[Callable[..., None]], Kernel]:
    """Declare a kernel with the Numba types of its arguments."""
    return lambda function: Kernel(function, signature)
