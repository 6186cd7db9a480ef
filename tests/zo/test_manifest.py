"""The manifest: one form in bytes, one hash, and no value out of range without a sentence that says so."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo.manifest import (
    DEFAULT_TEMPLATE,
    Manifest,
    ManifestError,
    Task,
    decode_manifest,
    parse_manifest,
    run_id,
    task,
    validate,
)
from zo.toml import documented_toml


def test_the_canonical_bytes_and_the_run_id_are_pinned(make_manifest):
    # Changing this gives every run another id, and so other directions.
    manifest = make_manifest()
    assert manifest.encode() == bytes.fromhex(GOLDEN_BYTES)
    assert manifest.run_id.hex() == GOLDEN_RUN_ID
    assert run_id(bytes.fromhex(GOLDEN_BYTES)) == manifest.run_id


def test_toml_to_canonical_bytes_and_back(make_manifest):
    manifest = make_manifest()
    parsed = parse_manifest(documented_toml(manifest, "A run."))
    assert parsed == manifest
    assert parsed.encode() == manifest.encode()
    assert decode_manifest(manifest.encode()) == manifest


@given(
    name=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=256),
    epsilon=st.floats(1e-300, 1),
    step=st.floats(1e-300, 4),
    alpha=st.floats(1e-300, 1024) | st.integers(1, 1024),
    exponent=st.integers(-64, 63),
    targets=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5),
    share=st.booleans(),
)
def test_any_manifest_survives_its_toml(make_manifest, name, epsilon, step, alpha, exponent, targets, share):
    plain = make_manifest()
    manifest = validate(
        msgspec.structs.replace(
            plain,
            base=msgspec.structs.replace(plain.base, name=name),
            adapter=msgspec.structs.replace(plain.adapter, alpha=alpha, targets=tuple(targets)),
            probe=msgspec.structs.replace(plain.probe, epsilon=epsilon),
            schedule=msgspec.structs.replace(plain.schedule, step=step, first_exponent=exponent),
            parity=msgspec.structs.replace(plain.parity, share_loss=share),
        )
    )
    assert parse_manifest(documented_toml(manifest, "A run.")).run_id == manifest.run_id


def test_every_field_of_the_toml_is_explained(make_manifest):
    lines = documented_toml(make_manifest(), "A run.").splitlines()
    fields = [index for index, line in enumerate(lines) if " = " in line and not line.startswith("#")]
    assert len(fields) == 62
    assert all(lines[index - 1].startswith("# ") for index in fields)
    tables = [index for index, line in enumerate(lines) if line.startswith("[")]
    assert all(lines[index - 1].startswith("# ") for index in tables)


def test_a_whole_number_for_a_fraction_does_not_change_the_run_id(make_manifest):
    text = documented_toml(make_manifest(), "A run.")
    assert "alpha = 8.0" in text
    assert parse_manifest(text.replace("alpha = 8.0", "alpha = 8")).run_id == make_manifest().run_id


def test_bytes_of_another_form_are_refused_since_their_id_would_be_another(make_manifest):
    manifest = make_manifest()
    adapter = msgspec.structs.replace(manifest.adapter, alpha=8)
    lax = msgspec.structs.replace(manifest, adapter=adapter)
    with pytest.raises(ManifestError, match="canonical"):
        decode_manifest(lax.encode())
    assert validate(lax).encode() == manifest.encode()


OUT_OF_RANGE = [
    ("run", "rounds", 0),
    ("run", "rounds", 100_000_001),
    ("run", "staleness", -1),
    ("run", "staleness", 2),
    ("run", "pipeline", -1),
    ("run", "pipeline", 2),
    ("run", "name", ""),
    ("run", "name", "../escape"),
    ("run", "name", "x" * 65),
    ("run", "signer", "1f"),
    ("run", "nonce", "0" * 31),
    ("run", "nonce", "G" * 32),
    ("base", "name", ""),
    ("base", "name", "x" * 257),
    ("base", "revision", "x" * 257),
    ("base", "digest", "abc"),
    ("base", "tokenizer_digest", "abc"),
    ("base", "quantize", "int4"),
    ("base", "skip_quantize", ("x",) * 65),
    ("base", "dtype", "int8"),
    ("base", "any_quantization", 1),
    ("task", "kind", "chat"),
    ("task", "labels", tuple(map(str, range(1025)))),
    ("task", "words", "great"),
    ("task", "template", "{text}" + "x" * 16384),
    ("task", "objective", "rouge"),
    ("task", "score", "x" * 257),
    ("task", "max_new_tokens", 0),
    ("adapter", "targets", ("x",) * 65),
    ("adapter", "rank", 0),
    ("adapter", "rank", 257),
    ("adapter", "alpha", 0.0),
    ("adapter", "alpha", 1025.0),
    ("adapter", "alpha", float("nan")),
    ("adapter", "alpha", float("inf")),
    ("adapter", "train", "A"),
    ("adapter", "start", "1a"),
    ("adapter", "size", 0),
    ("adapter", "size", 2**31 + 1),
    ("adapter", "layout_digest", "1a"),
    ("agents", "count", 0),
    ("agents", "count", 129),
    ("agents", "assignment", "some"),
    ("directions", "policy", "open"),
    ("directions", "groups", 253),
    ("directions", "combine", "sum"),
    ("directions", "trim", 50),
    ("directions", "pool_size", 1),
    ("directions", "pool_size", 65_537),
    ("directions", "pool_draw", "often"),
    ("probe", "epsilon", 0.0),
    ("probe", "epsilon", 1.5),
    ("probe", "epsilon", float("nan")),
    ("probe", "directions", 0),
    ("probe", "directions", 4097),
    ("probe", "batch_size", 0),
    ("probe", "batch_size", 65537),
    ("probe", "sequence_length", 1),
    ("probe", "sequence_length", 1_048_577),
    ("probe", "sides", 0),
    ("probe", "sides", 3),
    ("probe", "local_steps", 0),
    ("probe", "estimators", ()),
    ("codes", "bits", 2),
    ("moves", "projections", -1),
    ("moves", "projections", 4097),
    ("moves", "updates", 0),
    ("moves", "updates", 65537),
    ("moves", "optimizer", "lion"),
    ("moves", "rate", 0.0),
    ("moves", "rate", 11.0),
    ("schedule", "step", 0.0),
    ("schedule", "step", -0.1),
    ("schedule", "step", 4.5),
    ("schedule", "decay", "polynomial"),
    ("schedule", "warm_up", -1),
    ("schedule", "half_life", -1),
    ("schedule", "normalised", 1),
    ("schedule", "momentum", 17),
    ("schedule", "weight_decay", 31),
    ("schedule", "smoothing", -1),
    ("schedule", "smoothing", 17),
    ("schedule", "first_exponent", -65),
    ("schedule", "first_exponent", 64),
    ("schedule", "full_votes", 0),
    ("schedule", "full_votes", 65537),
    ("parity", "digest_every", 0),
    ("parity", "digest_every", 65),
    ("parity", "share_loss", 1),
    ("audit", "rows", ("{}",) * 65),
]

NEEDED = {
    "groups": {"policy": "groups", "groups": 2},
    "combine": {"policy": "shared"},
    "trim": {"policy": "shared", "combine": "trimmed", "trim": 9},
    "pool_size": {"policy": "pool"},
    "pool_draw": {"policy": "pool"},
}
"""What a field would mean nothing without."""


@pytest.mark.parametrize(("section", "field", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_named_with_its_field(make_manifest, section, field, value):
    manifest = make_manifest(quantize="nf4")  # only then may layers be skipped
    if field == "labels":  # only a task that needs them may have them
        manifest = make_manifest(quantize="nf4", kind="head", labels=("0", "1"))
    if field in ("words", "template"):
        words = {"labels": tuple("great"), "words": tuple("GREAT"), "template": "{text}"}
        manifest = make_manifest(quantize="nf4", kind="verbalizer", **words)
    if field == "score":
        manifest = make_manifest(quantize="nf4", kind="completion", objective="callable", score="m:f")
    if field in NEEDED:
        manifest = make_manifest(quantize="nf4", **NEEDED[field])
    wrong = msgspec.structs.replace(getattr(manifest, section), **{field: value})
    manifest = msgspec.structs.replace(manifest, **{section: wrong})
    shown = list(value) if isinstance(value, tuple) else value
    for check in (lambda: validate(manifest), lambda: parse_manifest(documented_toml(manifest, "A run."))):
        with pytest.raises(ManifestError) as caught:
            check()
        assert f"{section}.{field} = {shown!r}: expected " in str(caught.value)


def test_every_field_with_a_range_is_in_the_list_above(make_manifest):
    manifest = make_manifest()
    sections = [name for name in manifest.__struct_fields__ if name != "protocol"]
    fields = {
        (section, field) for section in sections for field in getattr(manifest, section).__struct_fields__
    }
    assert fields == {(section, field) for section, field, _ in OUT_OF_RANGE}


def test_local_steps_share_the_directions_and_one_sided_there_are_two_in_each(make_manifest):
    assert make_manifest(directions=6, local_steps=3, sides=1).probe.local_steps == 3
    with pytest.raises(ValueError, match=r"probe.local_steps = 4 must divide probe.directions = 6"):
        make_manifest(directions=6, local_steps=4)
    with pytest.raises(ValueError, match=r"at least 12, got 6: two in each local step"):
        make_manifest(directions=6, local_steps=6, sides=1)


def test_moves_need_a_number_of_their_own_private_directions_and_a_gradient(make_manifest):
    manifest = make_manifest(projections=5)
    assert manifest.samples_per_round == 5
    assert make_manifest(projections=1).samples_per_round == 2
    with pytest.raises(ValueError, match=r"moves.projections = 2 must differ from probe.directions"):
        make_manifest(projections=2)
    with pytest.raises(ValueError, match=r"needs directions.policy = 'private', got 'shared'"):
        make_manifest(projections=5, policy="shared")
    with pytest.raises(ValueError, match=r"needs a gradient, and objective = 'accuracy' has none"):
        make_manifest(projections=5, objective="accuracy")
    with pytest.raises(ValueError, match=r"times moves.projections = 4096 must be at most"):
        make_manifest(projections=4096, rounds=100_000_000)


def test_messages_say_what_would_be_right(make_manifest):
    text = documented_toml(make_manifest(), "A run.")

    def message(old: str, new: str) -> str:
        assert old in text
        with pytest.raises(ManifestError) as caught:
            parse_manifest(text.replace(old, new))
        return str(caught.value)

    assert message('train = "B"', 'train = "C"').startswith("adapter.train = 'C': expected 'B' or 'AB'. ")
    assert message("rounds = 20", "rounds = 0").startswith(
        "run.rounds = 0: expected `int` >= 1. Rounds until"
    )
    assert message("rounds = 20", "rounds = 1.5").startswith("run.rounds = 1.5: expected `int`, got `float`")
    assert "missing required field `rounds`" in message("rounds = 20", "")
    assert message("rounds = 20", "round = 20") == (
        "run: Object contains unknown field `round`; the fields are name, rounds, staleness, pipeline, nonce, signer"
    )
    assert message('["q_proj", "v_proj"]', '["q_proj", 3]').startswith(
        "adapter.targets[1] = 3: expected `str`"
    )
    assert "unknown field `runs`" in message("[run]", "[runs]")
    assert message("[run]", "[run").startswith("not TOML: ")


def test_rounds_times_directions_must_fit_the_names_of_directions(make_manifest):
    assert make_manifest(rounds=2**20, directions=4096).run.rounds == 2**20
    with pytest.raises(
        ValueError, match=r"run\.rounds = 1048577 times probe\.directions = 4096 must be at most"
    ):
        make_manifest(rounds=2**20 + 1, directions=4096)
    text = documented_toml(make_manifest(), "A run.").replace("rounds = 20", "rounds = 100000000")
    with pytest.raises(ManifestError, match="must be at most 4294967296, got 409600000000"):
        parse_manifest(text.replace("directions = 2", "directions = 4096"))


def test_one_direction_cannot_be_compared_with_the_mean_of_itself(make_manifest):
    assert make_manifest(sides=1, directions=2).probe.sides == 1
    text = documented_toml(make_manifest(directions=2), "A run.").replace("directions = 2", "directions = 1")
    with pytest.raises(
        ManifestError, match=r"probe\.sides = 1 needs probe\.directions to be at least 2, got 1"
    ):
        parse_manifest(text.replace("sides = 2", "sides = 1"))


def test_layers_cannot_be_left_out_of_a_quantisation_that_there_is_not(make_manifest):
    text = documented_toml(make_manifest(quantize="nf4", skip_quantize=("q_proj",)), "A run.")
    assert parse_manifest(text).base.skip_quantize == ("q_proj",)
    with pytest.raises(ManifestError, match=r"base\.skip_quantize = \['q_proj'\] needs base\.quantize to be"):
        parse_manifest(text.replace('"nf4"', '"none"'))


@pytest.mark.parametrize(
    ("kind", "labels", "words"),
    [
        ("head", (), r"a task with labels must name at least two, got \[\]"),
        ("head", ("0",), r"a task with labels must name at least two, got \['0'\]"),
        ("head", ("b", "a", "b"), "labels names 'b' more than once"),
        ("head", ("a", ""), r"task\.labels\[1\] = '': expected `str` of length >= 1"),
        ("text", ("a", "b"), r"labels = \['a', 'b'\] needs kind = 'verbalizer' or 'head', got 'text'"),
    ],
)
def test_labels_fit_the_task(make_manifest, kind, labels, words):
    with pytest.raises(ValueError, match=words):
        make_manifest(kind=kind, labels=labels)
    text = documented_toml(make_manifest(), "A run.")
    wrong = text.replace('kind = "text"', f'kind = "{kind}"')
    wrong = wrong.replace("labels = []", f"labels = {list(labels)!r}".replace("'", '"'))
    with pytest.raises(ManifestError, match=words):
        parse_manifest(wrong)


WORDS = {"kind": "verbalizer", "labels": ("0", "1"), "words": ("bad", "good"), "template": "{text} It was"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"words": ("bad",)}, "the label '1' has no word that stands for it"),
        ({"words": ("bad", "good", "fine")}, "words has 3 entries for 2 labels"),
        ({"words": ("bad", "bad")}, "words names 'bad' more than once"),
        ({"words": ("bad", " good")}, "a word has no white space around it, got ' good'"),
        ({"template": "It was"}, r"template must hold \{text\} once, got 'It was'"),
        ({"template": "{text} {text}"}, r"template must hold \{text\} once"),
        ({"kind": "head"}, "words and template need kind = 'verbalizer', got 'head'"),
    ],
)
def test_words_fit_the_labels(make_manifest, changes, words):
    assert make_manifest(**WORDS).task.head_labels is None
    with pytest.raises(ValueError, match=words):
        make_manifest(**WORDS | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"kind": "text", "objective": "token-f1"},
            "objective = 'token-f1' judges what is said after a prompt",
        ),
        (
            {"kind": "completion", "objective": "callable"},
            "objective = 'callable' and score = '' do not go together",
        ),
        (
            {"kind": "completion", "score": "m:f"},
            "objective = 'cross-entropy' and score = 'm:f' do not go together",
        ),
    ],
)
def test_objectives_fit_the_task(make_manifest, changes, words):
    assert make_manifest(objective="accuracy").task.kind == "text"
    assert make_manifest(kind="completion", objective="callable", score="m:f").task.score == "m:f"
    with pytest.raises(ValueError, match=words):
        make_manifest(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": "groups"}, "policy = 'groups' and groups = 1 do not go together"),
        ({"policy": "shared", "groups": 2}, "policy = 'shared' and groups = 2 do not go together"),
        ({"combine": "median"}, "combine = 'median' needs policy = 'shared' or 'groups', got 'private'"),
        ({"policy": "shared", "combine": "trimmed"}, "combine = 'trimmed' and trim = 0 do not go together"),
        ({"policy": "shared", "trim": 25}, "combine = 'mean' and trim = 25 do not go together"),
        (
            {"policy": "shared", "staleness": 1},
            r"run\.staleness = 1 needs directions\.policy = 'private' or 'pool', got",
        ),
    ],
)
def test_policies_that_cannot_be(make_manifest, changes, words):
    assert make_manifest(policy="groups", groups=2, combine="trimmed", trim=10).directions.are_combined
    assert not make_manifest(staleness=1).directions.are_combined
    with pytest.raises(ValueError, match=words):
        make_manifest(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"staleness": 1}, r"run\.pipeline = 1 needs run\.staleness = 0, got 1: behind late codes"),
        (
            {"policy": "pool", "pool_draw": "importance"},
            r"directions\.pool_draw = 'importance' needs run\.pipeline = 0, got 1: the importances",
        ),
    ],
)
def test_what_cannot_be_measured_ahead(make_manifest, changes, words):
    assert make_manifest(pipeline=1, policy="pool").run.pipeline == 1
    make_manifest(**changes)
    with pytest.raises(ValueError, match=words):
        make_manifest(pipeline=1, **changes)


def test_a_task_from_a_command_line():
    assert task("text") == Task()
    assert task("head", ["0", "a=b"]) == Task(kind="head", labels=("0", "a=b"))
    assert task("verbalizer", ["0=bad", "a=b=good"], "{text}!") == Task(
        kind="verbalizer", labels=("0", "a=b"), words=("bad", "good"), template="{text}!"
    )
    assert task("verbalizer", ["0=bad", "1=good"]).template == DEFAULT_TEMPLATE
    with pytest.raises(ValueError, match=r"the label '1' has no word .*: give LABEL=WORD, as 1=yes"):
        task("verbalizer", ["0=bad", "1"])
    with pytest.raises(ValueError, match="words and template need kind = 'verbalizer', got 'text'"):
        task("text", template="{text}")


def test_only_a_head_may_be_trained_alone(make_manifest):
    assert make_manifest(targets=(), kind="head", labels=("0", "1")).adapter.targets == ()
    with pytest.raises(ValueError, match=r"adapter\.targets must name at least one module, got none"):
        make_manifest(targets=())


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xc1", b"\x93\x01\x02\x03", b"\x80", b"\x81" * 2000])
def test_what_is_no_manifest_is_a_manifest_error(data):
    with pytest.raises(ManifestError, match="not a run manifest"):
        decode_manifest(data)


def test_any_cut_or_changed_byte_is_a_manifest_error_or_another_run(make_manifest):
    manifest = make_manifest()
    data = manifest.encode()
    for index in range(len(data)):
        with pytest.raises(ManifestError):
            decode_manifest(data[:index])
        for other in (0x00, 0x7F, 0xFF, data[index] ^ 1):
            changed = data[:index] + bytes([other]) + data[index + 1 :]
            try:
                decoded = decode_manifest(changed)
            except ManifestError:
                continue
            assert (decoded.run_id == manifest.run_id) == (changed == data)


def test_manifests_differ_in_their_ids_by_any_field(make_manifest):
    ids = {
        make_manifest(**change).run_id for change in ({}, {"nonce": "0" * 32}, {"rank": 5}, {"step": 0.03})
    }
    assert len(ids) == 4
    assert all(isinstance(each, bytes) and len(each) == 16 for each in ids)
    assert isinstance(make_manifest(), Manifest)


GOLDEN_BYTES = (
    "8da870726f746f636f6c01a372756e86a46e616d65a474657374a6726f756e647314a97374616c656e65737300a870697065"
    "6c696e6500a56e6f6e6365d9203031323334353637383961626364656630313233343536373839616263646566a67369676e"
    "6572a0a46261736588a46e616d65a46e6f6e65a87265766973696f6ea0a6646967657374d920623062306230623062306230"
    "6230623062306230623062306230623062306230b0746f6b656e697a65725f646967657374d9203730373037303730373037"
    "303730373037303730373037303730373037303730a87175616e74697a65a46e6f6e65ad736b69705f7175616e74697a6590"
    "a56474797065a7666c6f61743332b0616e795f7175616e74697a6174696f6ec2a47461736b87a46b696e64a474657874a66c"
    "6162656c7390a5776f72647390a874656d706c617465a0a96f626a656374697665ad63726f73732d656e74726f7079a57363"
    "6f7265a0ae6d61785f6e65775f746f6b656e7320a76164617074657287a77461726765747392a6715f70726f6aa6765f7072"
    "6f6aa472616e6b04a5616c706861cb4020000000000000a5747261696ea142a57374617274a0a473697a65cd01f4ad6c6179"
    "6f75745f646967657374d9203161316131613161316131613161316131613161316131613161316131613161a66167656e74"
    "7382a5636f756e7401aa61737369676e6d656e74a3616c6caa646972656374696f6e7386a6706f6c696379a7707269766174"
    "65a667726f75707301a7636f6d62696e65a46d65616ea47472696d00a9706f6f6c5f73697a65cd1000a9706f6f6c5f647261"
    "77a7756e69666f726da570726f626587a7657073696c6f6ecb3f847ae147ae147baa646972656374696f6e7302aa62617463"
    "685f73697a6508af73657175656e63655f6c656e677468cc80a5736964657302ab6c6f63616c5f737465707301aa65737469"
    "6d61746f727394a974776f2d7369646564a96f6e652d7369646564a7666f7277617264a86261636b77617264a56d6f766573"
    "84ab70726f6a656374696f6e7300a7757064617465730aa96f7074696d697a6572a56164616d77a472617465cb3f689374bc"
    "6a7efaa5636f64657381a46269747308a87363686564756c658aa473746570cb3f947ae147ae147ba56465636179a66c696e"
    "656172a77761726d5f757000a968616c665f6c69666500aa6e6f726d616c69736564c3a9736d6f6f7468696e6703ae666972"
    "73745f6578706f6e656e74fcaa66756c6c5f766f74657301a86d6f6d656e74756d00ac7765696768745f646563617900a670"
    "617269747982ac6469676573745f657665727904aa73686172655f6c6f7373c3a5617564697481a4726f777390"
)
GOLDEN_RUN_ID = "00bb4c64a3373ea9ce0b90cf6ae821ba"
