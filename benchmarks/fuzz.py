"""Fuzzing of everything that is read from outside: any bytes in, a well-formed value or the documented error out.

    pip install atheris
    python -m benchmarks.fuzz --minutes 10

Each target takes bytes and returns; whatever it raises is a finding. Atheris, which is no dependency of the project,
mutates them so that ever more branches are reached; `tests/benchmarks/test_fuzz.py` runs the same targets with
Hypothesis, always. The first byte of an input of Atheris chooses the target.
"""

import contextlib
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Final

import msgspec
import numpy as np
import zstandard
from safetensors.numpy import save

from benchmarks.command import command_line
from coordinator.conductor import Conductor
from coordinator.config import ServiceConfig
from coordinator.effects import Effect, Enrol, Persist, PersistCheckpoint, Quarantine
from coordinator.keyring import Keyring, KeyringError
from coordinator.roster import Roster
from coordinator.trained import default_targets, head_of
from coordinator.virtual_track import VirtualTrack
from transport import adapter_files, base_files
from transport.adapter_files import AdapterFilesError, read_start
from transport.base_files import BaseFilesError
from transport.brevity import brief
from transport.catchup import Download
from transport.keys import KeyFileError, KeyPair, load_key
from transport.messages import (
    PROTOCOL_VERSION,
    Admitted,
    Answer,
    Audit,
    Brief,
    Fetch,
    Finished,
    Follow,
    FromCoordinator,
    FromNode,
    Hello,
    History,
    Identify,
    Leave,
    Offer,
    Piece,
    Progress,
    Redeem,
    Refuse,
    Report,
    Resync,
    Rotate,
    Sealed,
    Trace,
    Welcome,
    WireError,
    address,
    addressed,
    decode_from_coordinator,
    decode_from_node,
    encode,
)
from transport.seals import Signer
from transport.session import Open, Session, Stage, StartOver
from transport.squeezing import squeezed
from transport.ticket import Ticket, TicketError, parse_ticket
from zo import manifest as manifests
from zo.codes import NO_VOTE
from zo.commit import Commit, Revert, decode_entry
from zo.layout import Head
from zo.manifest import Manifest, ManifestError, decode_manifest, parse_manifest
from zo.packing import unpack
from zo.replica import Replica
from zo.snapshot import SnapshotError, content_address, decode_snapshot, encode_snapshot
from zo.toml import documented_toml
from zo.weights import zeros

Target = Callable[[bytes], None]
_SIZE: Final = 50
_BASE, _TOKENIZER = "b0" * 16, "70" * 16
_SIGNER: Final = Signer(bytes(range(32)))
_HEAD: Final = Head(2, 4, has_bias=True)
_SHAPES: Final = {"model.layers.0.q_proj": (4, 4)}


@cache
def _manifest() -> Manifest:
    return manifests.validate(
        Manifest(
            protocol=1,
            run=manifests.Run(name="fuzz", rounds=1000, nonce="00" * 16, signer=_SIGNER.public),
            base=manifests.BaseModel(name="none", digest=_BASE, tokenizer_digest=_TOKENIZER),
            adapter=manifests.Adapter(
                targets=("q_proj",), rank=4, alpha=8.0, train="B", size=_SIZE, layout_digest="1a" * 16
            ),
            probe=manifests.Probing(epsilon=0.01, directions=2, batch_size=8, sequence_length=128),
            schedule=manifests.Schedule(step=0.02, decay="linear", smoothing=3, first_exponent=-4),
            parity=manifests.Parity(digest_every=4, share_loss=True),
        )
    )


# ---- what is decoded ---------------------------------------------------------------------------------------------


def node_frame(data: bytes) -> None:
    """A frame from a node: what is taken for a message has one form."""
    with contextlib.suppress(WireError):
        agent, bare = addressed(data)
        message = decode_from_node(bare)
        assert decode_from_node(addressed(address(encode(message), agent))[1]) == message


def coordinator_frame(data: bytes) -> None:
    """A frame from a coordinator."""
    with contextlib.suppress(WireError):
        message = decode_from_coordinator(addressed(data)[1])
        assert decode_from_coordinator(encode(message)) == message


def ledger_entry(data: bytes) -> None:
    """An entry of a ledger: what is taken for one has these bytes and no others."""
    with contextlib.suppress(ValueError):
        assert decode_entry(data).encode() == data


def packed_codes(data: bytes) -> None:
    """Codes of any width: as many as were asked for, each one that the width has."""
    for bits in (8, 4, 1):
        with contextlib.suppress(ValueError):
            assert unpack(data, 6, bits).shape == (6,)


def snapshot(data: bytes) -> None:
    """A snapshot: weights of the run's size, and never more memory than those take."""
    with contextlib.suppress(SnapshotError):
        assert decode_snapshot(data, _manifest()).weights.shape == (_SIZE,)


def manifest_bytes(data: bytes) -> None:
    """A manifest on the wire: what is taken for one has these bytes and no others."""
    with contextlib.suppress(ManifestError):
        assert decode_manifest(data).encode() == data


def manifest_text(data: bytes) -> None:
    """A manifest.toml."""
    with contextlib.suppress(ManifestError):
        read = parse_manifest(data.decode("utf-8", "replace"))
        assert parse_manifest(documented_toml(read, "")) == read


def ticket(data: bytes) -> None:
    """A ticket: what is taken for one says so again; an error does not show the token."""
    text, said = data.decode("utf-8", "replace"), ""
    try:
        read = parse_ticket(text)
        assert parse_ticket(str(read)) == read
    except TicketError as error:
        said = str(error)
    token = text.partition("#")[2].partition(".")[2].strip()
    public = text.strip().removesuffix(token)
    assert len(token) <= 8 or token not in said or token in public


# ---- files -------------------------------------------------------------------------------------------------------


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


@contextlib.contextmanager
def _files(**contents: bytes) -> Iterator[Path]:
    """A directory with these files, `_` for a dot in their names, only their owner's."""
    for name, content in contents.items():
        path = _folder() / name.replace("__", ".")
        path.write_bytes(content)
        path.chmod(0o600)
    yield _folder()
    for path in _folder().iterdir():
        path.unlink()


def _halves(data: bytes) -> tuple[bytes, bytes]:
    """Two files in one input: the length of the first, two bytes, stands before it."""
    length = int.from_bytes(data[:2], "little")
    return data[2 : 2 + length], data[2 + length :]


def key_file(data: bytes) -> None:
    """A key file; an error does not show what is in it."""
    said = ""
    with _files(node__key=data) as folder:
        try:
            assert len(load_key(folder / "node.key").secret) == 32
        except KeyFileError as error:
            said = str(error)
    text = data.decode("ascii", "replace").strip()
    assert len(text) < 16 or text not in said


def keyring(data: bytes) -> None:
    """A coordinator's keyring."""
    with (
        _files(keys__sqlite=data) as folder,
        contextlib.suppress(KeyringError),
        Keyring(folder / "keys.sqlite") as ring,
    ):
        assert ring.path.exists()


def base(data: bytes) -> None:
    """The files of a base, as `init` and every node read them."""
    config, tensors = _halves(data)
    with (
        _files(config__json=config, model__safetensors=tensors) as folder,
        contextlib.suppress(BaseFilesError),
    ):
        read = base_files.configuration(folder)
        base_files.is_causal(read)
        shapes = base_files.tensor_shapes(folder)
        head_of(read, shapes, 2)
        default_targets(base_files.linear_shapes(shapes, read))


def adapter(data: bytes) -> None:
    """The files of an adapter that a run starts from."""
    config, tensors = _halves(data)
    files = {adapter_files.CONFIGURATION: config, adapter_files.TENSORS: tensors}
    with _files(**{name.replace(".", "__"): content for name, content in files.items()}) as folder:
        for head in (None, _HEAD):
            with contextlib.suppress(AdapterFilesError):
                start = read_start(folder, _SHAPES, head)
                assert all(values.dtype == np.float32 for values in start.values.values())


# ---- what is decided ---------------------------------------------------------------------------------------------


def _spoken(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Who says what in an input: a byte, then the length of a frame, two bytes, and the frame."""
    place = 0
    while place + 3 <= len(data):
        length = int.from_bytes(data[place + 1 : place + 3], "little")
        yield data[place], data[place + 3 : place + 3 + length]
        place += 3 + length


def _said(*spoken: tuple[int, bytes]) -> bytes:
    return b"".join(bytes([who]) + len(frame).to_bytes(2, "little") + frame for who, frame in spoken)


def _hello() -> Hello:
    run = _manifest()
    base_digest, tokenizer_digest = bytes.fromhex(_BASE), bytes.fromhex(_TOKENIZER)
    return Hello(PROTOCOL_VERSION, run.run_id, base_digest, tokenizer_digest, 0, run.run_id, "n")


class _Coordinator:
    """A conductor with two honest nodes, and a ledger in memory that must stay a ledger."""

    def __init__(self) -> None:
        self.track = VirtualTrack(_manifest(), 0, self._fail)
        self.num_enrolled, self.quarantined = 0, set[int]()
        self.conductor: Conductor = self.track.start_conductor(ServiceConfig(quorum=2), Roster(), 0.0)
        for node in (0, 1):
            self.say(node, _hello(), 0.0)
        self.play(0.0)

    def _fail(self, what: str) -> None:
        raise AssertionError(what)

    def say(self, node: int, message: FromNode, now: float) -> None:
        """A message of a node, over a connection that has proved its key."""
        if not isinstance(message, Redeem | Rotate):  # those are for the keyring
            session, key = b"session %d" % node, node.to_bytes(32, "big")
            self.carry_out(self.conductor.on_message(session, key, message, now), now)

    def carry_out(self, effects: list[Effect], now: float) -> None:
        """Do what is durable."""
        for effect in [*effects, *self.conductor.settle()]:
            match effect:
                case Persist(commit, frame):
                    self.track.persist(commit, frame, now)
                case PersistCheckpoint(round, digest, scale):
                    self.track.checkpoint(round, digest, scale)
                case Enrol():
                    self.num_enrolled += 1
                case Quarantine(node):
                    self.quarantined.add(node)

    def play(self, now: float) -> None:
        """A round of the honest nodes."""
        for node in (0, 1):
            self.say(node, Report(self.conductor.round % 256, b"\x10\xf0"), now)


def conductor(data: bytes) -> None:
    """Frames of members and strangers, and time that passes, at a coordinator: two honest nodes go on undisturbed."""
    run, now = _Coordinator(), 0.0
    for who, frame in _spoken(data):
        now += who >> 4
        run.carry_out(run.conductor.on_tick(now), now)
        with contextlib.suppress(WireError):
            run.say(2 + who % 3, decode_from_node(addressed(frame)[1]), now)
    assert not run.quarantined & {0, 1}
    assert run.num_enrolled <= 5
    assert len(run.conductor.members) <= 5
    now += 10_000.0
    run.carry_out(run.conductor.on_tick(now), now)
    for node in (0, 1):
        run.say(node, _hello(), now)
    before = len(run.track.frames)
    run.play(now)
    run.carry_out(run.conductor.on_tick(now + 10_000.0), now + 10_000.0)
    assert len(run.track.frames) > before
    commit = decode_entry(run.track.frames[-1])
    assert isinstance(commit, Commit)
    assert set(commit.participants) >= {0, 1}
    run.track.check(run.conductor.replica)


def session(data: bytes) -> None:
    """Frames of a coordinator, and time that passes, at a node: weights move by whole commits of one chain alone."""
    run = _manifest()
    fresh = Replica(run, zeros(_SIZE))
    node = Session(
        run.run_id, bytes.fromhex(_BASE), bytes.fromhex(_TOKENIZER), "n", None, Download(bytes(16))
    )
    node.on_link_up()
    now = 0.0
    for who, frame in _spoken(data):
        now += who >> 4
        effects = node.on_tick(now)
        if who & 1 and node.next_probe() is not None:
            round, _ = node.next_probe() or (0, 0)
            effects += node.on_probed(round, np.array([1, NO_VOTE], np.int8), 1.0, now)
        if who & 2:
            node.on_link_down()
            effects += node.on_link_up()
        before = node.stage
        with contextlib.suppress(WireError):
            effects += node.on_message(decode_from_coordinator(addressed(frame)[1]), now)
        assert before is not Stage.ENDED or node.stage is Stage.ENDED
        for effect in effects:
            if isinstance(effect, Open | StartOver):
                node.opened(Replica(run, fresh.weights.copy()), now)
        if node.replica is not None:
            assert node.replica.weights.shape == (_SIZE,)
            assert (node.replica.round == 0) <= (not node.replica.weights.any())
        if node.download is not None:
            assert len(node.download.data) <= 5 * _SIZE + 4096


TARGETS: Final[tuple[Target, ...]] = (
    node_frame,
    coordinator_frame,
    ledger_entry,
    packed_codes,
    snapshot,
    manifest_bytes,
    manifest_text,
    ticket,
    key_file,
    keyring,
    base,
    adapter,
    conductor,
    session,
)


# ---- where to begin ----------------------------------------------------------------------------------------------


def messages() -> tuple[list[FromNode], list[FromCoordinator]]:
    """One of every type, from a node and from a coordinator; those of the latter belong to one short run."""
    run = _manifest()
    truth = Replica(run, zeros(_SIZE))
    commit = Commit(0, (1000,), (-5,), (0, 1), b"\x01\x02\x03\x04", truth.head)
    truth.apply(commit)
    following = Commit(1, (900,), (-5,), (0, 1), b"\x04\x03\x02\x01", truth.head)
    shorter = brief(commit, following)
    assert shorter is not None
    saved = encode_snapshot(truth, run)
    content = content_address(saved)
    offer = Offer(content, 1, len(saved), 0, 0, 10**6, 10**6, True)
    return [
        _hello(),
        Report(0, b"\x03\xfc"),
        Progress(1, truth.digest(), 2345),
        Leave(),
        Fetch(content, 0),
        Follow(1, truth.head),
        Trace(1, (truth.digest(),)),
        Redeem(run.run_id, bytes(32)),
        Rotate(bytes(32)),
        Answer(1, bytes(8)),
    ], [
        Welcome(PROTOCOL_VERSION, 0, run.encode(), 0, -4, None),
        commit,
        shorter,
        Sealed(1, truth.head, _SIGNER.seal(run.run_id, 1, truth.head)),
        History((commit.encode(), following.encode())),
        Welcome(PROTOCOL_VERSION, 0, run.encode(), 1, -4, offer),
        Piece(content, 0, len(saved), saved),
        Resync(1, truth.digest()),
        Identify(),
        Finished(1, truth.digest()),
        Refuse("run", "this is another run"),
        Admitted(bytes(32)),
        Audit(1, 0),
    ]


@cache
def seeds(target: Target) -> list[bytes]:
    """Well-formed inputs of a target."""
    from_node, from_coordinator = messages()
    run = _manifest()
    if target in (node_frame, coordinator_frame):
        frames = [encode(each) for each in (from_node if target is node_frame else from_coordinator)]
        if target is coordinator_frame:
            history = encode(History(tuple(each.encode() for each in _chain(8))))
            assert squeezed(history) != history
            frames += [squeezed(history), msgspec.msgpack.encode(zstandard.compress(frames[0]))]
        return [*frames, *(address(frame, 3) for frame in frames)]
    if target is ledger_entry:
        commits = [each for each in from_coordinator if isinstance(each, Commit)]
        return [*(each.encode() for each in commits), Revert(3, 1, 2, (1,), bytes(16), bytes(16)).encode()]
    if target is packed_codes:
        return [bytes(6), b"\x12\x34\x56", b"\x3f", b"\x3f\x01"]
    if target is snapshot:
        return [each.data for each in from_coordinator if isinstance(each, Piece)]
    if target is manifest_bytes:
        return [run.encode()]
    if target is manifest_text:
        return [documented_toml(run, "").encode()]
    if target is ticket:
        tickets = [
            Ticket("192.0.2.7", 7411, bytes(16), bytes(range(32)), token) for token in (b"", bytes(16))
        ]
        return [str(each).encode() for each in tickets]
    if target is key_file:
        return [KeyPair(bytes(32), bytes(range(32))).secret.hex().encode() + b"\n"]
    if target is keyring:
        return [_a_keyring()]
    if target is base:
        return [_two(_BASE_CONFIG, save({"model.layers.0.q_proj.weight": np.zeros((4, 4), np.float32)}))]
    if target is adapter:
        factors = {
            f"base_model.model.model.layers.0.q_proj.lora_{factor}.weight": shape for factor, shape in _AB
        }
        plain = {name: np.zeros(shape, np.float32) for name, shape in factors.items()}
        head = {"score.weight": np.zeros((2, 4), np.float32), "score.bias": np.zeros(2, np.float32)}
        return [_two(_ADAPTER_CONFIG, save(each)) for each in (plain, plain | head)]
    if target is conductor:
        said = [(2, encode(each)) for each in from_node]
        return [_said(*said), _said(said[0], said[1], (3, said[0][1]), (4, said[3][1])), _said(*said[::-1])]
    assert target is session
    heard = [(1, encode(each)) for each in from_coordinator]
    by_type = {type(each): said for each, said in zip(from_coordinator, heard, strict=True)}
    offer = next(
        said
        for each, said in zip(from_coordinator, heard, strict=True)
        if isinstance(each, Welcome) and each.offer
    )
    return [
        _said(*heard),
        _said(heard[0], *(by_type[each] for each in (Commit, Sealed, Brief, Finished))),
        _said(heard[0], by_type[History], by_type[Sealed]),
        _said(offer, by_type[Piece], by_type[Sealed]),
        _said(*heard[::-1]),
    ]


def _chain(length: int) -> list[Commit]:
    commits: list[Commit] = []
    for round in range(length):
        previous = commits[-1].digest() if commits else _manifest().run_id
        commits.append(Commit(round, (1000,), (-5,), (0, 1), bytes((1, 2, 3, round)), previous))
    return commits


_AB: Final = (("A", (2, 4)), ("B", (4, 2)))
_BASE_CONFIG: Final = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4}
_ADAPTER_CONFIG: Final = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}


def _two(config: dict[str, object], tensors: bytes) -> bytes:
    text = json.dumps(config).encode()
    return len(text).to_bytes(2, "little") + text + tensors


def _a_keyring() -> bytes:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        with Keyring(folder / "keys.sqlite", create=True):
            pass
        return (folder / "keys.sqlite").read_bytes()
    finally:
        shutil.rmtree(folder)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The same with some bytes changed, or a part of it left out or there twice."""
    changed = bytearray(data)
    for _ in range(rng.randint(0, 4)):
        if changed:
            changed[rng.randrange(len(changed))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    if changed and rng.random() < 0.5:
        begin, end = sorted((rng.randrange(len(changed)), rng.randrange(len(changed))))
        changed[begin:end] = changed[begin:end] * rng.choice((0, 2))
    return bytes(changed)


def _functions() -> Iterator[FunctionType]:
    """Every function of ours that a target may reach; to watch libraries as well would slow all of it down."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("zo", "transport", "coordinator"):
            continue
        classes = [each for each in vars(module).values() if isinstance(each, type)]
        for holder in [module, *classes]:
            for each in vars(holder).values():
                if isinstance(each, FunctionType) and each.__module__ == name:
                    yield each


def main() -> None:
    """Fuzz with Atheris; it ends with a trace and the input at the first finding."""
    parser = command_line("fuzz", __doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    names = [each.__name__ for each in TARGETS]
    parser.add_argument("--only", choices=names, metavar="TARGET", help=f"one of {', '.join(names)}")
    parser.add_argument("--corpus", type=Path, help="directory of inputs, kept for the next time")
    parser.add_argument("input", type=Path, nargs="?", help="run one input again, as a finding named it")
    options = parser.parse_args()
    chosen = [each for each in TARGETS if options.only in (None, each.__name__)]

    def one(data: bytes) -> None:
        if data:
            chosen[data[0] % len(chosen)](data[1:])

    if options.input is not None:
        one(options.input.read_bytes())
        return
    import atheris

    corpus = options.corpus or _folder().with_name(_folder().name + "-corpus")
    corpus.mkdir(parents=True, exist_ok=True)
    for index, target in enumerate(chosen):
        for number, seed in enumerate(seeds(target)):
            (corpus / f"seed-{target.__name__}-{number}").write_bytes(bytes([index]) + seed)
    for function in _functions():
        atheris.instrument_func(function)
    limits = [
        f"-max_total_time={round(60 * options.minutes)}",
        "-max_len=8192",
        "-timeout=30",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
