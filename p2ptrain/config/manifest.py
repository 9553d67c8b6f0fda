"""The manifest: what all peers of a run must agree on. Its canonical form is hashed to the run id and signed.

The owner's key lives in the home that first bootstrapped the run (`owner.key`); peers need only its public half, which
the manifest carries.

Whoever joins reads a manifest written by a stranger: every number is bounded at both ends (which keeps out NaN and
infinity too), every text has an alphabet, and a value is refused before anything is built from it.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Literal

import base58
import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Meta

from p2ptrain.compression.codec import Robust
from p2ptrain.errors import ManifestError

if TYPE_CHECKING:
    from p2ptrain.chain import ChainState

PROTOCOL_VERSION = 10
MANIFEST_MAX_BYTES = 16 * 1024
PARAMETERS_MAX = 2**31
TOKENIZER_VOCABULARY = 4096
"""Tokens of the tokenizer shipped."""
VOCABULARY_MIN, VOCABULARY_MAX = 257, 2**19
SOURCES_MAX = 16
CONFIG_MAX_BYTES = 8 * 1024
"""Of the architecture of a model that `transformers` has. It stands in the manifest and in no file of the run, so that
whoever joins refuses a model before anything of it is fetched, and the run's id says what is trained. Configs of
language models take 1 to 3 KiB; this leaves half of a manifest to the rest."""

Count = Annotated[int, Meta(ge=1, le=2**20)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Share = Annotated[float, Meta(ge=0, le=1)]
Hex256 = Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")]
PeerId = Annotated[str, Meta(pattern=r"^12D3KooW[1-9A-HJ-NP-Za-km-z]{44}\Z")]
RunName = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*\Z")]
Topk = Annotated[int, Meta(ge=1, le=4096)]
Strategy = Literal["demo", "local_demo", "diloco", "sparse_diloco", "dense"]


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the manifest: unknown keys are errors."""


class ModelConfig(_Table, frozen=True, kw_only=True):
    """The GPT to build."""

    layers: Annotated[int, Meta(ge=1, le=256)] = 2
    """Transformer blocks."""
    heads: Annotated[int, Meta(ge=1, le=256)] = 4
    """Attention heads a block; must divide `embedding` into even widths."""
    embedding: Annotated[int, Meta(ge=8, le=32_768)] = 128
    """Width of the model."""
    context: Annotated[int, Meta(ge=8, le=65_536)] = 128
    """Tokens in a sequence."""
    vocabulary: Annotated[int, Meta(ge=VOCABULARY_MIN, le=VOCABULARY_MAX)] = TOKENIZER_VOCABULARY
    """Rows of the embedding and of the head; at least as many as the tokenizer has tokens; the shipped one has 4096."""
    mlp_ratio: Annotated[int, Meta(ge=1, le=16)] = 4
    """Hidden width of the MLP over `embedding`."""

    def __post_init__(self) -> None:
        if self.embedding % (2 * self.heads):
            raise ValueError(f"embedding = {self.embedding} must be a multiple of 2 * heads = {2 * self.heads}")
        if self.parameters > PARAMETERS_MAX:
            raise ValueError(
                f"layers = {self.layers} and embedding = {self.embedding}, with vocabulary = {self.vocabulary}, make "
                f"{self.parameters:,} parameters; at most {PARAMETERS_MAX:,} are supported"
            )

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        block = self.embedding**2 * (4 + 2 * self.mlp_ratio) + 2 * self.embedding
        return 2 * self.vocabulary * self.embedding + self.layers * block + self.embedding


class FileConfig(_Table, frozen=True, kw_only=True):
    """A file that every peer of the run needs, handed out in pieces."""

    bytes: Annotated[int, Meta(ge=1, le=2**38)]
    """Length in bytes. At most 256 GiB, so that the hashes of its pieces, which a joiner fetches first and each peer
    holds in memory, take at most 16 MiB."""
    root: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    """Hash over the length and the hashes of all pieces."""


class LoraConfig(_Table, frozen=True, kw_only=True):
    """Small matrices beside those of a model that is held fixed (LoRA, arXiv 2106.09685): they alone are trained."""

    rank: Annotated[int, Meta(ge=1, le=1024)]
    """Rank of the product of two small matrices that is added to a matrix of the model."""
    alpha: Annotated[float, Meta(gt=0, le=65_536)]
    """That product is multiplied by alpha over rank."""
    targets: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=96, pattern=r"^[A-Za-z0-9_.]+\Z")], ...],
        Meta(min_length=1, max_length=64),
    ]
    """Ends of the names of the modules that get them."""
    fixed_parameters: Annotated[int, Meta(ge=1, le=PARAMETERS_MAX)]
    """Number of parameters of the model that is held fixed."""


class TaskConfig(_Table, frozen=True, kw_only=True):
    """What is trained, where it does not follow from `model` and `nonce` alone; written by `p2ptrain init --model` and
    `--from`, and by `p2ptrain.bootstrap` of Python."""

    kind: Literal["code", "hf", "gpt"] = "code"
    """Where the model comes from: `code`, a module that each peer's own program has made; `hf`, an architecture that
    the library `transformers` has, by its config; `gpt`, the GPT of `model`, with other first values."""
    parameters: Annotated[int, Meta(ge=1, le=PARAMETERS_MAX)]
    """Number of parameters that are trained."""
    values: FileConfig
    """The run's beginning: names, shapes, kinds and first values, with `lora` those of the model that is held fixed."""
    config: Annotated[str, Meta(min_length=2, max_length=CONFIG_MAX_BYTES)] | msgspec.UnsetType = msgspec.UNSET
    """With kind `hf`, the architecture: JSON as in config.json, with sorted keys and without spaces."""
    context: Annotated[int, Meta(ge=8, le=65_536)] | msgspec.UnsetType = msgspec.UNSET
    """With kind `hf`, tokens in a sequence."""
    lora: LoraConfig | msgspec.UnsetType = msgspec.UNSET
    """With kind `hf`: small matrices are trained, and the model is held fixed; left out: all of it is trained."""

    def __post_init__(self) -> None:
        of_hf = {"config": self.config, "context": self.context, "lora": self.lora}
        set_keys = [name for name, value in of_hf.items() if value is not msgspec.UNSET]
        if self.kind != "hf" and set_keys:
            raise ValueError(f"{set_keys[0]} is for kind hf, and contradicts kind {self.kind}")
        if self.kind == "hf":
            if msgspec.UNSET in (self.config, self.context):
                raise ValueError("kind hf needs config and context; p2ptrain init --model writes them")
            _ = self.vocabulary

    @property
    def architecture(self) -> dict[str, object]:
        """The config of kind `hf`. Raises ValueError: it is no JSON object in canonical form."""
        assert isinstance(self.config, str)
        try:
            found = json.loads(self.config, parse_constant=_refuse_constant)
        except RecursionError as error:
            raise ValueError("config is nested too deeply") from error
        if not isinstance(found, dict) or canonical_json(found) != self.config:
            raise ValueError("config is no JSON object with sorted keys and without spaces")
        return found

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding of kind `hf`. Raises ValueError: the config does not say it."""
        rows = self.architecture.get("vocab_size")
        if not isinstance(rows, int) or not VOCABULARY_MIN <= rows <= VOCABULARY_MAX:
            raise ValueError(
                f"config says vocab_size = {str(rows)[:40]}; it has to be from {VOCABULARY_MIN} to {VOCABULARY_MAX:,}"
            )
        return rows

    @property
    def lora_config(self) -> LoraConfig | None:
        """How small matrices are trained; None: all of the model is."""
        return None if isinstance(self.lora, msgspec.UnsetType) else self.lora

    @property
    def values_parameters(self) -> int:
        """Number of parameters whose values are in the run's beginning."""
        return self.parameters if self.lora_config is None else self.lora_config.fixed_parameters


def canonical_json(table: dict[str, object]) -> str:
    """The one text of a JSON object: sorted keys, no spaces, ASCII. Raises ValueError: it holds what JSON has not."""
    return json.dumps(table, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"config holds {name}, which JSON does not have")


class SourceConfig(_Table, frozen=True, kw_only=True):
    """Where a part of the text comes from, and on what terms."""

    name: Annotated[str, Meta(min_length=1, max_length=80, pattern=r"^[\w.-][\w .-]*\Z")]
    """Name of the source."""
    license: Annotated[str, Meta(max_length=80, pattern=r"^[A-Za-z0-9][A-Za-z0-9 .+-]*\Z")]
    """SPDX licence expression."""
    sha256: Hex256 = ""
    """Hash of the file as it lay on disk; of several, that of what `sha256sum` prints of them."""
    bytes: Annotated[int, Meta(ge=0, le=2**50)] = 0
    """Length of that."""
    url: Annotated[str, Meta(max_length=200, pattern=r"^(https?://[!-~]+)?\Z")] = ""
    """Where it can be had."""
    attribution: Annotated[str, Meta(max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z")] = ""
    """Whom to name, as its licence asks."""


class DataConfig(_Table, frozen=True, kw_only=True):
    """The text to train on, by hash."""

    name: Annotated[str, Meta(min_length=1, max_length=80, pattern=r"^[\w.-][\w .-]*\Z")] = "state-of-the-union"
    """Name of the corpus; `state-of-the-union` is shipped with p2ptrain."""
    license: Annotated[str, Meta(max_length=80, pattern=r"^[A-Za-z0-9][A-Za-z0-9 .+-]*\Z")] = "LicenseRef-Public-Domain"
    """SPDX licence expression of the text."""
    private: bool = False
    """Each peer trains on text of its own (`--data`), which never leaves its disk; only held-out text is handed out."""
    sha256: Hex256 = ""
    """Hash of the training text of the shipped corpus; empty: that of this version, or of a text of one's own."""
    bytes: Annotated[int, Meta(ge=0, le=2**50)] = 0
    """Length of the training text in bytes."""
    heldout_sha256: Hex256 = ""
    """Hash of the held-out text of the shipped corpus."""
    heldout_bytes: Annotated[int, Meta(ge=0, le=2**32)] = 0
    """Length of the held-out text in bytes."""
    tokenizer_sha256: Hex256 = ""
    """Hash of the tokenizer; empty: that of the one shipped."""
    tokens: FileConfig | msgspec.UnsetType = msgspec.UNSET
    """A text of one's own as tokens, with its tokenizer; left out: the shipped corpus."""
    sources: Annotated[tuple[SourceConfig, ...], Meta(max_length=SOURCES_MAX)] | msgspec.UnsetType = msgspec.UNSET
    """Where a text of one's own comes from."""

    def __post_init__(self) -> None:
        if self.private and (self.sha256 or self.bytes):
            raise ValueError("private = true contradicts sha256 and bytes, which are of a text that all share")
        if self.token_file is not None and (self.sha256 or self.heldout_sha256):
            raise ValueError("sha256 and heldout_sha256 are of the shipped corpus, and contradict tokens")

    @property
    def token_file(self) -> FileConfig | None:
        """The text as tokens; None: it is the shipped corpus."""
        return None if isinstance(self.tokens, msgspec.UnsetType) else self.tokens


class GroupConfig(_Table, frozen=True, kw_only=True):
    """How parameters of one kind are compressed and stepped."""

    transform: Literal["dct", "none"] = "dct"
    """`dct`: chunks are transformed before the largest entries are selected; `none`: they are not."""
    direction: Literal["sign", "rms", "muon", "sgd", "nesterov", "adam"] = "sign"
    """From update to step: `sign`, `rms` (over the root of its second moment), `sgd` (as it is), or with momentum that
    all replicas keep: `nesterov`, `adam`, and for matrices `muon` (blocks of 64 by 64 made orthogonal)."""
    learning_rate_scale: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    """Factor on the learning rate of the replica's steps."""
    topk: Topk = 52
    """Coefficients sent per chunk of 4096."""
    reply_topk: Topk = 44
    """Coefficients a reducer keeps per chunk, at most."""


_MATRICES = GroupConfig(direction="muon", learning_rate_scale=1.5)
# Few entries of these matter in a round, and sign treats all alike: it costs 0.2 bits a byte on the small model.
_ENDS = GroupConfig(transform="none", direction="rms", learning_rate_scale=32.0)


class OptimizerConfig(_Table, frozen=True, kw_only=True):
    """What peers compute in a round, and how each kind of parameter is treated."""

    strategy: Strategy = "demo"
    """What enters the momentum in a round: `demo`, `local_demo` and `dense`: the mean gradient; `diloco` and
    `sparse_diloco`: how far inner steps of AdamW went on a peer's own. In a run.toml it also decides what the keys left
    out are: see docs/learning.md."""
    learning_rate: Annotated[float, Meta(gt=0, le=10)] = 1e-3
    """Peak learning rate: the size of a step, before a kind's own scale, or that of inner steps. Left out, it follows
    from the model's width and the batch."""
    inner_batch: Count = 16
    """Sequences of one inner step, where there are any."""
    look_ahead: Annotated[float, Meta(ge=0, le=10)] = 0.0
    """Learning rate of inner steps over `learning_rate`, where the mean gradient is gathered: each gradient is taken
    where those before it lead to. 0: all at the replica. Costs four times the memory of the parameters."""
    outer_learning_rate: Annotated[float, Meta(gt=0, le=10)] = 1.0
    """Learning rate of the replica's steps with strategies `diloco` and `sparse_diloco`; it stays the same."""
    beta: Share = 0.95
    """Factor on the momentum, each round."""
    weight_decay: Annotated[float, Meta(ge=0, le=10)] = 0.0
    """Share of a parameter taken off each round, times the learning rate."""
    warmup_rounds: Annotated[int, Meta(ge=1, le=1_000_000)] = 10
    """Rounds of linear warm-up. Left out, as many tokens as suit the model's size."""
    total_rounds: Annotated[int, Meta(ge=1, le=100_000_000)] = 2000
    """Round at which the cosine reaches its end."""
    final_fraction: Share = 0.1
    """Learning rate at the end over its peak."""
    direction_momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    """Decay of the first moment of directions `nesterov`, `adam` and `muon`, and of inner steps."""
    rms_beta: Annotated[float, Meta(ge=0, lt=1)] = 0.95
    """Decay of the second moment of directions `rms` and `adam`, and of inner steps."""
    rms_epsilon: Annotated[float, Meta(ge=1e-30, le=1)] = 1e-8
    """Added to the root of that second moment."""
    matrix: GroupConfig = _MATRICES
    """Hidden matrices."""
    embedding: GroupConfig = _ENDS
    """Token embedding."""
    head: GroupConfig = _ENDS
    """Output head."""
    vector: GroupConfig = _ENDS
    """Gains and other vectors."""

    @property
    def gathers_way(self) -> bool:
        """Whether it is how far inner steps went that enters the momentum."""
        return self.strategy in ("diloco", "sparse_diloco")

    def __post_init__(self) -> None:
        if self.vector.direction == "muon":
            raise ValueError('vector.direction = "muon" needs matrices; use "sign" or "rms"')
        if self.look_ahead and self.gathers_way:
            raise ValueError(f"look_ahead contradicts strategy {self.strategy}, whose learning_rate is of inner steps")


class CodecConfig(_Table, frozen=True, kw_only=True):
    """How contributions are encoded."""

    value_bits: Literal[1, 2, 8] = 2
    """Bits a value: sign, with 2 a magnitude bit, with 8 a magnitude of up to 127."""


class RoundConfig(_Table, frozen=True, kw_only=True):
    """How long rounds are and how long peers wait."""

    pace: Literal["time", "fixed"] = "time"
    """`time`: all compute equally long; `fixed`: each computes `sequences_per_peer` and all are waited for."""
    sequences_per_peer: Count = 8
    """Sequences a peer computes in a round, with pace `fixed`."""
    micro_batch: Count = 4
    """Sequences in one forward and backward pass."""
    target_batch: Count = 16
    """Sequences the whole swarm should compute in a round, with pace `time`."""
    min_seconds: Seconds = 0.25
    """Shortest computing time of a round."""
    max_seconds: Seconds = 60.0
    """Longest computing time of a round."""
    overlap: Annotated[int, Meta(ge=0, le=1)] = 0
    """1: compute for the next round while the exchange of this one is under way; gradients are a step older."""
    round_max_seconds: Seconds = 30.0
    """After its own contribution a reducer waits at most this long for half of the others."""
    grace_seconds: Seconds = 2.0
    """And this much longer for the rest, at most: peers learn how long it takes, unless pace is `fixed`."""
    reply_timeout_seconds: Seconds = 4.0
    """After the first reply a sealer waits this long for the others, at most: learned as well."""
    seal_timeout_seconds: Seconds = 2.0
    """Each place in the sealer order waits this much longer than the one before."""
    alone_after_seconds: Seconds = 8.0
    """Silence of all members after which a peer seals alone."""
    root_interval: Annotated[int, Meta(ge=1, le=100_000)] = 64
    """Rounds between roots: hashes of all replicas, compared, and snapshots for those who join."""
    clip_ratio: Annotated[float, Meta(ge=1, le=1000)] = 3.0
    """A contribution's norm is clipped to this many times the median."""
    weight_cap_ratio: Annotated[float, Meta(ge=1, le=1000)] = 4.0
    """A contribution's weight is capped at this many times the median."""
    robust: Robust | msgspec.UnsetType = msgspec.UNSET
    """How a reducer sums contributions: `mean`; `bounded`: the mean, but nobody counts for more than the member in the
    middle, and who points against the others or is too much like some does not count; `centered_clip`: each is clipped
    by its distance from a center of all; `trimmed`: of each coefficient the largest and the smallest quarter do not
    count. Left out: `bounded`."""

    def __post_init__(self) -> None:
        if self.min_seconds > self.max_seconds:
            raise ValueError(f"min_seconds = {self.min_seconds} is above max_seconds = {self.max_seconds}")

    @property
    def sums_by(self) -> Robust:
        """How contributions are summed; by their bounded mean where the manifest does not say."""
        return "bounded" if isinstance(self.robust, msgspec.UnsetType) else self.robust


class AccessConfig(_Table, frozen=True, kw_only=True):
    """Who may take part, and read anything of the run."""

    mode: Literal["open", "invite", "list"] = "open"
    """`open`: anyone; `list`: the founder, the peers listed, and those that the owner adds later, one by one; `invite`:
    the same, and whoever holds an invitation."""
    peers: Annotated[tuple[PeerId, ...], Meta(max_length=150)] = ()
    """Peer ids for modes `list` and `invite`, as `p2ptrain id` prints them."""

    def __post_init__(self) -> None:
        if self.mode == "open" and self.peers:
            raise ValueError(f'mode = "open" contradicts peers, which lists {len(self.peers)}')


class EvaluationConfig(_Table, frozen=True, kw_only=True):
    """How often members measure the model on held-out text, in turn."""

    every_rounds: Annotated[int, Meta(ge=0, le=1_000_000)] = 50
    """Rounds between two measurements, each by another member; 0: none. Nobody waits for one that does not come."""
    tokens: Annotated[int, Meta(ge=1, le=2**24)] = 16_384
    """Tokens of held-out text to measure on, spread over all of it. A member that has not the time, 3 % of its own,
    uses fewer and says how many, or lets its turn pass."""


class Manifest(_Table, frozen=True, kw_only=True):
    """See the module docstring."""

    protocol: Annotated[int, Meta(ge=1, le=2**16)] = PROTOCOL_VERSION
    """Protocol version."""
    name: RunName
    """Name of the run, for people."""
    nonce: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
    """Random; makes the run unique and seeds its initialisation and its data order."""
    owner: Hex256 = ""
    """Public key that signs the manifest; filled in by `bootstrap`."""
    founder: PeerId | msgspec.UnsetType = msgspec.UNSET
    """Peer that makes the run's first seal, as nobody else may; filled in by `bootstrap`."""
    last_round: Annotated[int, Meta(ge=0, le=2**40)] = 0
    """Stop after this round; 0: never."""
    model: ModelConfig = ModelConfig()
    task: TaskConfig | msgspec.UnsetType = msgspec.UNSET
    """What is trained, where it is not the GPT of `model` from its beginning."""
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    codec: CodecConfig = CodecConfig()
    round: RoundConfig = RoundConfig()
    access: AccessConfig = AccessConfig()
    evaluation: EvaluationConfig | msgspec.UnsetType = msgspec.UNSET
    """How often members measure the model on held-out text, in turn; left out: never."""

    def __post_init__(self) -> None:
        task = self.task_config
        if task is not None and task.kind == "hf" and self.model != ModelConfig():
            raise ValueError('model is of the built-in GPT, and contradicts task.kind = "hf": leave it out')
        if task is not None and task.kind == "gpt" and task.parameters != self.model.parameters:
            raise ValueError(f"task.parameters = {task.parameters:,}, and model makes {self.model.parameters:,}")
        if self.data.token_file is None and self.vocabulary < TOKENIZER_VOCABULARY:
            where = "the vocab_size of task.config" if self._architecture is not None else "model.vocabulary"
            raise ValueError(f"{where} = {self.vocabulary} is below the tokenizer's {TOKENIZER_VOCABULARY} tokens")

    @property
    def task_config(self) -> TaskConfig | None:
        """What is trained, where it is not the GPT of `model` from its beginning."""
        return None if isinstance(self.task, msgspec.UnsetType) else self.task

    @property
    def own_model(self) -> TaskConfig | None:
        """What is trained where that is a module that each peer's own program makes; None: it is not."""
        return None if self.task_config is None or self.task_config.kind != "code" else self.task_config

    @property
    def _architecture(self) -> TaskConfig | None:
        return None if self.task_config is None or self.task_config.kind != "hf" else self.task_config

    @property
    def evaluated(self) -> EvaluationConfig | None:
        """How members measure the model in turn; None: they do not."""
        config = self.evaluation
        return None if isinstance(config, msgspec.UnsetType) or not config.every_rounds else config

    @property
    def parameters(self) -> int:
        """Number of parameters that are trained."""
        return self.model.parameters if self.task_config is None else self.task_config.parameters

    @property
    def context(self) -> int:
        """Tokens in a sequence, of whichever model is trained on text."""
        of_hf = None if self._architecture is None else self._architecture.context
        return of_hf if isinstance(of_hf, int) else self.model.context

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding, of whichever model is trained on text."""
        return self.model.vocabulary if self._architecture is None else self._architecture.vocabulary

    @property
    def founder_id(self) -> bytes:
        """Peer id of the founder; empty where the manifest names none, and whoever bootstraps first is."""
        return b"" if isinstance(self.founder, msgspec.UnsetType) else base58.b58decode(self.founder)

    @property
    def owner_id(self) -> bytes:
        """Id of the owner's key, in the form of a peer's; empty where the manifest is not signed yet."""
        from p2ptrain.chain.signatures import id_of_key

        return id_of_key(bytes.fromhex(self.owner)) if self.owner else b""

    def beginning(self, run_id: bytes) -> ChainState:
        """Return the chain before its first seal: who may make that, and who may take part."""
        # Here, because `--help` needs the manifest's words and none of what seals are made of.
        from p2ptrain.chain import genesis
        from p2ptrain.chain.admission import Access

        founder = (self.founder_id,) if self.founder_id else ()
        listed = tuple(dict.fromkeys((*founder, *map(base58.b58decode, self.access.peers))))
        access = Access(self.access.mode, self.owner_id, () if self.access.mode == "open" else listed)
        return genesis(run_id, self.founder_id, access)

    @property
    def records_key(self) -> bytes:
        """Key [32 bytes] that the run's peer records are encrypted with; empty where the run is open.

        Only those who have the manifest can compute it, and no outsider is given the manifest.
        """
        if self.access.mode == "open":
            return b""
        return hashlib.sha256(b"p2ptrain records 1\0" + canonical_bytes(self)).digest()


class SignedManifest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A manifest as it travels."""

    body: Annotated[bytes, Meta(max_length=MANIFEST_MAX_BYTES)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


class _ProtocolOnly(msgspec.Struct, frozen=True):
    protocol: int


_decoder = msgspec.msgpack.Decoder(Manifest)
_signed_decoder = msgspec.msgpack.Decoder(SignedManifest)
_protocol_decoder = msgspec.msgpack.Decoder(_ProtocolOnly)


def canonical_bytes(manifest: Manifest) -> bytes:
    """The one encoding of a manifest: every field that is set, in the order declared."""
    # By way of plain types: a struct's own encoding chooses the length of a map's header by all fields, set or not.
    return msgspec.msgpack.encode(msgspec.to_builtins(manifest))


def run_id(body: bytes) -> bytes:
    """Id of the run whose canonical manifest is `body` [32 bytes]."""
    return hashlib.sha256(b"p2ptrain manifest 1\0" + body).digest()


def sign_manifest(manifest: Manifest, key: Ed25519PrivateKey, founder: str) -> bytes:
    """Fill in the owner and the founder, sign, and encode for travel.

    Args:
        founder: id of the peer that makes the run's first seal.

    Raises:
        ManifestError: larger than peers accept.
    """
    owner = key.public_key().public_bytes_raw().hex()
    body = canonical_bytes(msgspec.structs.replace(manifest, owner=owner, founder=founder))
    encoded = msgspec.msgpack.encode(SignedManifest(body, key.sign(run_id(body))))
    if len(encoded) > MANIFEST_MAX_BYTES:
        raise ManifestError(
            f"the manifest takes {len(encoded)} bytes; peers accept {MANIFEST_MAX_BYTES}",
            hint="shorten access.peers or data.sources",
        )
    return encoded


def open_manifest(encoded: bytes, expected_run_id: bytes | None = None) -> tuple[Manifest, bytes]:
    """Check a signed manifest from anywhere; returns it and its run id.

    Raises:
        ManifestError: too large, malformed, not canonical, another run's, or not signed by the owner it names.
    """
    if len(encoded) > MANIFEST_MAX_BYTES:
        raise ManifestError(f"manifest of {len(encoded)} bytes refused; at most {MANIFEST_MAX_BYTES}")
    try:
        signed = _signed_decoder.decode(encoded)
        # First, because the fields of another protocol's manifest may differ.
        _check_protocol(_protocol_decoder.decode(signed.body).protocol)
        manifest = _decoder.decode(signed.body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ManifestError(f"not a manifest: {error}", hint="do both sides run the same p2ptrain version?") from error
    identifier = run_id(signed.body)
    if canonical_bytes(manifest) != signed.body:
        raise ManifestError(
            "manifest is not in canonical form",
            hint="its keys are not those of this p2ptrain, in its order: install the version that the run's owner uses",
        )
    if expected_run_id is not None and identifier != expected_run_id:
        raise ManifestError(f"manifest hashes to {identifier.hex()[:16]}, not to {expected_run_id.hex()[:16]}")
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(manifest.owner)).verify(signed.signature, identifier)
    except (InvalidSignature, ValueError) as error:
        raise ManifestError("manifest is not signed by the owner that it names") from error
    return manifest, identifier


def _check_protocol(protocol: int) -> None:
    if protocol != PROTOCOL_VERSION:
        raise ManifestError(
            f"the run speaks protocol {protocol}, this p2ptrain speaks {PROTOCOL_VERSION}",
            hint="install the p2ptrain version that the run uses",
        )
