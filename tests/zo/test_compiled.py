"""When compilation happens: once per machine, never unannounced, and never at the price of the run."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import types

import zo
from zo import kernels, loops
from zo.compiled import Kernel

ROOT = Path(zo.__file__).parent.parent
ASK = "from zo import kernels; print(kernels.is_compiled())"
COMPILE_AND_RUN = """
import numpy as np
from zo import kernels
from zo.directions import Direction, stack
from zo.weights import digest
kernels.compile_kernels()
weights = np.zeros(5000, np.int32)
kernels.apply(weights, (1, 2), stack([Direction(0, 0)]), np.array([3], np.int32))
kernels.perturbed(weights, (1, 2), Direction(0, 0), 0.5)
hits = [sum(kernel._dispatcher.stats.cache_hits.values()) for kernel in __import__("zo.loops").loops.ALL]
print(kernels.is_compiled(), digest(0, weights).hex(), *hits)
"""


def start(script, cache_dir, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(cache_dir), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.split()


def test_processes_share_what_one_has_compiled_even_when_they_start_together(tmp_path):
    assert output(start(ASK, tmp_path)) == ["False"]
    together = [output(process) for process in [start(COMPILE_AND_RUN, tmp_path) for _ in range(2)]]
    assert {tuple(words[:2]) for words in together} == {("True", together[0][1])}
    assert output(start(ASK, tmp_path)) == ["True"]
    another_processor = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    assert output(start(ASK, tmp_path, **another_processor)) == ["False"]
    later = output(start(COMPILE_AND_RUN, tmp_path))
    assert set(later[2:]) == {"1"}  # each kernel came from the cache
    assert later[1] == together[0][1]


def test_a_full_disk_costs_the_cache_and_not_the_run(monkeypatch):
    tiny = Kernel(lambda out: None, (types.float64[::1],))

    def disk_full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tiny._dispatcher._cache, "save_overload", disk_full, raising=False)
    tiny(np.zeros(1))
    assert tiny.is_compiled()


TINY = """
from numba import types
from zo.compiled import kernel

@kernel(types.float64[::1])
def double(out):
    for i in range(out.shape[0]):
        out[i] *= 2
"""
USE_TINY = """
import numpy as np, tiny
ready, out = tiny.double.is_compiled(), np.ones(3)
tiny.double(out)
print(ready, out.sum(), tiny.double.is_compiled())
"""


def read_only_source(folder):
    """A module whose cache cannot lie beside it, not even for root: a file is in the place of the folder."""
    folder.mkdir()
    (folder / "tiny.py").write_text(TINY)
    (folder / "__pycache__").write_text("")
    return os.pathsep.join([str(folder), str(ROOT)])


def test_a_read_only_source_is_cached_for_the_user(tmp_path):
    path = read_only_source(tmp_path / "source")
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": path}
    assert output(start(USE_TINY, "", **home)) == ["False", "6.0", "True"]
    assert output(start(USE_TINY, "", **home)) == ["True", "6.0", "True"]


def test_no_place_for_a_cache_costs_the_cache_and_not_the_run(tmp_path):
    path = read_only_source(tmp_path / "source")
    (tmp_path / "file").write_text("")
    nowhere = {"HOME": str(tmp_path / "file"), "XDG_CACHE_HOME": str(tmp_path / "file"), "PYTHONPATH": path}
    for _ in range(2):
        assert output(start(USE_TINY, "", **nowhere)) == ["False", "6.0", "True"]


def test_once_compiled_always_compiled():
    kernels.compile_kernels()
    assert kernels.is_compiled()
    kernels.compile_kernels()


def test_a_kernel_refuses_types_it_was_not_declared_for():
    with pytest.raises(TypeError):
        loops.perturbation(1, 2, 3, 4, 5, 0, np.zeros(3, np.float64))
