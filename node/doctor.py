"""The doctor: whether this machine can take part, as a list of findings. It repairs nothing and joins nothing.

Each check returns what it found and, if something is wrong, what to do; only the command line shows it.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from node.base import Base, BaseError, load_base, read_digest, read_tokenizer_digest, resolve
from node.device import DeviceError, device_of
from node.memory import PROBING, OutOfMemoryError, memory_explained
from node.quantization import Form
from transport.base_files import BaseFilesError, configuration, is_causal, is_in_layer, tensor_shapes
from transport.hub import bytes_to_fetch
from transport.keys import KeyFileError, invitation_keys, load_key, new_key_pair
from transport.sockets import Link, NodeSocket, SocketError
from transport.ticket import Ticket
from zo import kernels, reference
from zo.directions import Direction
from zo.manifest import Manifest, Probing
from zo.quantization import FOUR_BIT, KINDS, Kind

State = Literal["ok", "warn", "fail"]
EARLIEST: Final = datetime(2026, 1, 1, tzinfo=UTC)
ENOUGH_DISK_BYTES: Final = 256 << 20
LEAST_DISK_BYTES: Final = 16 << 20
ERROR_BY_KIND: Final = {"int8": 0.03, "nf4": 0.2, "fp4": 0.25}
"""How far a quantised product may be from the exact one, relative to its norm; Gaussian weights have half of it."""
KNOWN_ANSWERS: Final = (
    # Random123 1.14, tests/kat_vectors: philox4x32, 10 rounds. Counter (block, sample, node, agent), key, words.
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor's table."""

    check: str
    state: State
    found: str
    cure: str = ""
    """What to do about it; empty if all is well, or if `found` says it."""


def network(ticket: Ticket, timeout_s: float) -> Iterator[Finding]:
    """Whether the coordinator's port is open from here, and whether what answers has the ticket's key.

    The handshake is made with the ticket's token, or a key drawn for it, and nothing is sent: the coordinator sees no
    node, and the token stays as good as it was.
    """
    place = f"{ticket.host}:{ticket.port}"
    began = time.monotonic()
    try:
        socket.create_connection((ticket.host, ticket.port), timeout_s).close()
    except socket.gaierror as error:
        cure = "check the name in the ticket, and this machine's DNS"
        yield Finding(
            check="network", state="fail", found=f"{ticket.host}: {error.strerror or error}", cure=cure
        )
        return
    except OSError as error:
        refused = isinstance(error, ConnectionRefusedError)
        cure = (
            "is `zo-coordinator serve` running there, on this port?"
            if refused
            else "open the port in the firewalls between here and there, or serve with --advertise HOST"
        )
        what = "connection refused" if refused else str(error.strerror or error)
        yield Finding(check="network", state="fail", found=f"{place}: {what}", cure=cure)
        return
    yield Finding(
        check="network", state="ok", found=f"{place} is open, {1000 * (time.monotonic() - began):.0f} ms"
    )
    yield _handshake(ticket, timeout_s)


def _handshake(ticket: Ticket, timeout_s: float) -> Finding:
    try:
        end = NodeSocket(ticket, invitation_keys(ticket.token) if ticket.token else new_key_pair())
    except SocketError as error:
        return Finding(check="handshake", state="fail", found=str(error), cure="check the ticket")
    wrong = 0
    until = time.monotonic() + timeout_s
    try:
        while wrong < 3 and time.monotonic() < until:
            links, _ = end.poll(max(0.0, until - time.monotonic()))
            if Link.UP in links:
                return Finding(check="handshake", state="ok", found="the coordinator has the ticket's key")
            if Link.REFUSED in links:
                if ticket.token:
                    return Finding(
                        check="handshake",
                        state="fail",
                        found="the coordinator does not know the ticket's token",
                        cure="ask for a ticket made by `zo-coordinator invite`, and copy all of it",
                    )
                return Finding(
                    check="handshake",
                    state="warn",
                    found="the coordinator does not admit unknown keys",
                    cure="join with a key that it knows",
                )
            wrong += links.count(Link.WRONG_KEY)
    finally:
        end.close()
    return Finding(
        check="handshake",
        state="fail",
        found="what answers there does not have the ticket's key" if wrong else "no answer to the handshake",
        cure="ask for the ticket that `zo-coordinator serve` prints now",
    )


def key_file(path: Path) -> Finding:
    """Whether a node's key can be read, by its owner alone."""
    if not path.exists():
        return Finding(check="key", state="ok", found="none yet; made when this node first joins")
    try:
        load_key(path)
    except KeyFileError as error:
        cure = f"chmod 600 {path}" if "chmod" in str(error) else "restore it from a backup"
        return Finding(check="key", state="fail", found=str(error), cure=cure)
    return Finding(check="key", state="ok", found=f"{path}, readable by its owner alone")


def clock(now: float) -> Finding:
    """Whether the clock is plausible: logs and TLS certificates depend on it, the training does not."""
    shown = datetime.fromtimestamp(now, UTC)
    if shown < EARLIEST:
        return Finding(
            check="clock",
            state="warn",
            found=f"{shown:%Y-%m-%d %H:%M} UTC is in the past",
            cure="set it: the hub cannot be reached, and logs mislead; training does not depend on it",
        )
    return Finding(check="clock", state="ok", found=f"{shown:%Y-%m-%d %H:%M} UTC")


def disk(path: Path) -> Finding:
    """Whether there is space where a node keeps its state."""
    existing = _existing(path)
    free = _free_bytes(path)
    state: State = "fail" if free < LEAST_DISK_BYTES else "warn" if free < ENOUGH_DISK_BYTES else "ok"
    cure = "" if state == "ok" else "free some space, or name another place with --state"
    if not os.access(existing, os.W_OK):
        state, cure = "fail", f"name a place with --state that this user may write; {existing} is not"
    return Finding(check="disk", state=state, found=f"{megabytes(free)} free at {existing}", cure=cure)


def download(model: str) -> Finding | None:
    """What of a base on the hub is not on this machine yet, and whether there is space for it; None if all is here."""
    try:
        missing, cache = bytes_to_fetch(model)
    except BaseFilesError:  # the next check says so
        return None
    if not missing:
        return None
    free = _free_bytes(cache)
    found = f"{megabytes(missing)} to fetch from the hub, {megabytes(free)} free at {cache}"
    if missing > free:
        cure = "free some space, or name another place with the environment variable HF_HOME"
        return Finding(check="download", state="fail", found=found, cure=cure)
    cure = "the first join fetches it; after that the doctor can look at it"
    return Finding(check="download", state="warn", found=found, cure=cure)


def memory(folder: Path, form: Form) -> Finding:
    """Whether the base in a directory fits where it is to be held."""
    return enough(needed_bytes(folder, form), available_bytes(form.device), form.quantize)


def enough(needed: float, available: float | None, kind: Kind) -> Finding:
    """Whether the base fits: `needed` and `available` in bytes, None if the system does not say."""
    found = f"the base needs about {megabytes(needed)}"
    if available is None:
        return Finding(check="memory", state="warn", found=found, cure="see that this machine has as much")
    found += f", {megabytes(available)} are available"
    if needed <= 0.8 * available:
        return Finding(check="memory", state="ok", found=found)
    lower = "a smaller base" if kind in FOUR_BIT else "--quantize nf4, or a smaller base"
    state: State = "fail" if needed > available else "warn"
    return Finding(check="memory", state=state, found=found, cure=f"close other programs, or use {lower}")


def needed_bytes(folder: Path, form: Form) -> float:
    """Memory for a base in some form, from the headers of its files, and a third for activations.

    Raises:
        BaseError: a header cannot be read.
    """
    plain = 4.0 if form.dtype == "float32" else 2.0
    per_entry = {"none": plain, "int8": 1.01, "nf4": 0.57, "fp4": 0.57}[form.quantize]
    try:
        shapes = tensor_shapes(folder)
    except BaseFilesError as error:
        raise BaseError(str(error)) from error
    total = sum(
        math.prod(shape) * (per_entry if len(shape) == 2 and is_in_layer(name) else plain)
        for name, shape in shapes.items()
    )
    return total * 4 / 3


def available_bytes(device: str) -> float | None:
    """Memory that programs may still take on a device; of the host as Linux estimates it, None elsewhere."""
    place = device_of(device)
    if place.type == "cuda":
        import torch

        return float(torch.cuda.mem_get_info(place)[0])
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:")), None)


def base_files(path: str, manifest: Manifest | None) -> Iterator[Finding]:
    """The digests of base and tokenizer; compared with the run's, if this node knows its manifest."""
    expected = manifest.base if manifest else None
    for check, read, wanted in (
        ("base", read_digest, expected and expected.digest),
        ("tokenizer", read_tokenizer_digest, expected and expected.tokenizer_digest),
    ):
        try:
            digest = read(path)
        except BaseError as error:
            yield Finding(
                check=check, state="fail", found=str(error), cure="name the run's base with --model"
            )
            return
        if wanted and digest != wanted:
            found = f"digest {digest}, the run's has {wanted}"
            yield Finding(check=check, state="fail", found=found, cure="name the run's base with --model")
        else:
            same = ", the run's" if wanted else ""
            yield Finding(check=check, state="ok", found=f"digest {digest}{same}")


def generator() -> Finding:
    """Whether the fast kernels give the published answers, and what the plain reference gives."""
    for (block, sample, node, agent), key, words in KNOWN_ANSWERS:
        z = kernels.perturbation(key, Direction(node, sample, agent), 128, start=128 * block)
        bits = np.unpackbits(np.array(words, "<u4").view(np.uint8), bitorder="little")
        if not np.array_equal(z > 0, bits.astype(bool)):
            return _wrong_generator("Philox's published answers")
    rng = np.random.default_rng(0)
    weights = rng.integers(-(2**20), 2**20, 5_003).astype(np.int32)
    names = rng.integers(0, 2**16, (7, 3)).astype(np.uint32)
    coefficients = rng.integers(-1000, 1000, 7).astype(np.int32)
    expected = reference.apply(weights, (3, 5), names, coefficients)
    kernels.apply(weights, (3, 5), names, coefficients)
    if not np.array_equal(weights, expected):
        return _wrong_generator("the reference's update")
    return Finding(
        check="generator", state="ok", found=f"{len(KNOWN_ANSWERS)} known answers and an update, to the bit"
    )


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that exists."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(_existing(path)).free


def _wrong_generator(what: str) -> Finding:
    return Finding(
        check="generator",
        state="fail",
        found=f"the compiled kernels do not give {what}",
        cure="remove __pycache__ in the zo package; if it stays, this machine must not take part: please report it",
    )


def quantised_kernels(wanted: Kind) -> Iterator[Finding]:
    """One forward pass of each quantisation; only that of the run must work."""
    for kind in KINDS[1:]:
        try:
            error = _quantised_error(kind)
        except (
            Exception
        ) as problem:  # a library that is missing, or built for another machine: anything may come
            first = str(problem).partition("\n")[0] or type(problem).__name__
            yield Finding(
                check=kind,
                state="fail" if kind == wanted else "warn",
                found=f"does not work here: {first}",
                cure="install bitsandbytes for this machine, or use --quantize none",
            )
            continue
        good = error <= ERROR_BY_KIND[kind]
        yield Finding(
            check=kind,
            state="ok" if good else "fail" if kind == wanted else "warn",
            found=f"one forward pass, {100 * error:.1f} % from the exact result",
            cure="" if good else "reinstall bitsandbytes; its kernels compute wrongly here",
        )


def _quantised_error(kind: Kind) -> float:
    """How far a quantised layer of 128 × 64 is from the exact one, relative to the result's norm."""
    import torch

    from node.bnb import bitsandbytes as bnb

    generator = torch.Generator().manual_seed(0)  # any values do
    weight = torch.randn(128, 64, generator=generator)
    inputs = torch.randn(16, 64, generator=generator)
    layer: Any
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(64, 128, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(64, 128, bias=False, compute_dtype=torch.float32, quant_type=kind)
        layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type=kind)
    layer = layer.to("cpu")
    exact = inputs @ weight.T
    with torch.inference_mode():
        return float((layer(inputs).float() - exact).norm() / exact.norm())


def a_round(base: Base, manifest: Manifest | None, probing: Probing) -> Iterator[Finding]:
    """Whether the run's epsilon is heard on this machine, and how long a round of this node would take."""
    from node.trial import rehearsed

    try:
        with memory_explained("to probe", PROBING):
            found = rehearsed(base, manifest, probing)
    except ValueError as error:
        yield Finding(
            check="a round", state="fail", found=str(error), cure="name the run's base with --model"
        )
        return
    except OutOfMemoryError as error:
        yield Finding(check="a round", state="fail", found=str(error))
        return
    heard = (
        f"at epsilon {found.epsilon:g} random tokens' L+ - L- is {found.signal:.2g}, off by {found.noise:.2g}; equal "
        f"passes differ by {found.repeat:.2g}"
    )
    state: State = "ok" if not found.warning else "warn" if math.isfinite(found.signal) else "fail"
    cures = {
        "ok": "",
        "warn": "`zo-node calibrate` measures which epsilon suits",
        "fail": "use --dtype float32",
    }
    yield Finding(check="noise", state=state, found=heard, cure=cures[state])
    seconds = probing.directions * found.seconds
    shape = f"{probing.sides * probing.directions} of {probing.batch_size} × {probing.sequence_length} tokens"
    yield Finding(
        check="a round", state="ok", found=f"about {seconds:.2g} s of forward passes ({shape}); {found.how}"
    )


def device(name: str) -> Finding:
    """Whether there is such a device, and what it is."""
    try:
        place = device_of(name)
    except DeviceError as error:
        return Finding(check="device", state="fail", found=str(error))
    import torch

    if place.type == "cpu":
        return Finding(check="device", state="ok", found=f"cpu, {len(os.sched_getaffinity(0))} cores")
    return Finding(check="device", state="ok", found=f"{place}, {torch.cuda.get_device_name(place)}")


def load(
    path: str, form: Form, threads: int, labels: Sequence[str] | None = None
) -> tuple[Base | None, Finding]:
    """The base, as a classifier if there are labels, and how loading it went."""
    began = time.perf_counter()
    try:
        base = load_base(path, threads=threads, labels=labels, **form._asdict())
    except (BaseError, OutOfMemoryError) as error:
        return None, Finding(check="loading", state="fail", found=str(error))
    held = form.dtype if form.quantize == "none" else f"{form.quantize} and {form.dtype}"
    return base, Finding(
        check="loading",
        state="ok",
        found=f"{len(base.linear_shapes)} linear layers, {held}, {time.perf_counter() - began:.1f} s",
    )


def _labels(folder: Path, manifest: Manifest | None) -> Sequence[str] | None:
    """Those of the run; without one, any two for a model that predicts no next token."""
    if manifest is not None:
        return manifest.task.head_labels
    with contextlib.suppress(BaseFilesError):  # loading says what is wrong
        return None if is_causal(configuration(folder)) else ("0", "1")
    return None


def examine(
    *,
    ticket: Ticket | None,
    state: Path,
    manifest: Manifest | None,
    model: str,
    form: Form,
    probing: Probing,
    threads: int,
    timeout_s: float,
) -> Iterator[Finding]:
    """All findings, cheap ones first; each as soon as it is there.

    Args:
        ticket: of the run; None to look at this machine alone.
        state: where this node keeps its state, or would.
        manifest: of the run, if this node has joined it before.
        model: directory or hub name of the base.
        form: how to hold the base, and where.
        probing: of the run, or what stands for it.
        threads: to compute with.
        timeout_s: for the network.
    """
    if ticket is not None:
        yield from network(ticket, timeout_s)
    yield key_file(state / "node.key")
    yield clock(time.time())
    yield disk(state)
    yield generator()
    place = device(form.device)
    yield place
    yield from quantised_kernels(form.quantize)
    fetching = download(model)
    if fetching is not None:
        yield fetching
        return
    found = list(base_files(model, manifest))
    yield from found
    if any(each.state == "fail" for each in (place, *found)):
        return
    fits = memory(resolve(model), form)
    yield fits
    if fits.state == "fail":
        return
    base, loading = load(model, form, threads, _labels(resolve(model), manifest))
    yield loading
    if base is not None:
        yield from a_round(base, manifest, probing)


def megabytes(number: float) -> str:
    """Bytes for people: "812 MB", "3.4 GB"."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.{int(number < 1e7)}f} MB"
