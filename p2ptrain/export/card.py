"""The model card: what a model was trained on, by whom, how far, and how anyone can check that.

Names, addresses and attributions in a manifest are strangers' text. In Markdown each of their punctuation marks is
escaped, so that they are read as they stand; the front matter is written by a YAML library.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from urllib.parse import quote

import base58

from p2ptrain import __version__
from p2ptrain.config.manifest import PROTOCOL_VERSION, SourceConfig
from p2ptrain.data.token_file import Header
from p2ptrain.export.held import Held

_PUNCTUATION = str.maketrans({mark: f"\\{mark}" for mark in string.punctuation})
_DATASET = re.compile(r"https://huggingface\.co/datasets/([\w.-]+/[\w.-]+)/?")
#: identifiers of the hub that are not an SPDX identifier in lower case
_HUB_LICENCES = {
    "C-UDA-1.0": "c-uda",
    "GFDL-1.2-or-later": "gfdl",
    "GFDL-1.3-only": "gfdl",
    "GFDL-1.3-or-later": "gfdl",
    "ODC-By-1.0": "odc-by",
    "ODbL-1.0": "odbl",
    "PDDL-1.0": "pddl",
}
#: SPDX identifiers that the hub has in lower case, those of the GPL without their ending
_HUB_KNOWS = re.compile(
    r"A?GPL-3\.0(-only|-or-later)|L?GPL-(2\.[01]|3\.0)(-only|-or-later)|Apache-2\.0|Artistic-2\.0|BSD-[23]-Clause|BSL-1\.0"
    r"|CC0-1\.0|CC-BY(-NC|-NC-SA)?-[234]\.0|CC-BY-2\.5|CC-BY(-SA|-NC-ND)-[34]\.0|CC-BY-ND-4\.0|CDLA-Permissive-[12]\.0"
    r"|CDLA-Sharing-1\.0|EUPL-1\.2|ISC|MIT|MPL-2\.0|Unlicense|Zlib"
)


@dataclass(frozen=True, slots=True)
class Lines:
    """Some lines of code."""

    language: str
    """Empty: a shell's."""
    text: str


@dataclass(frozen=True, slots=True)
class Told:
    """What a card says beside what the home holds."""

    format: str
    """`hf`, `safetensors` or `gguf`."""
    sources: tuple[SourceConfig, ...]
    """Empty: the run names none."""
    text: Header | None
    """How long the text is; None: this home does not know."""
    parameters_sha256: str
    files: Mapping[str, str]
    """{name of a file with parameters: its SHA-256}."""
    bits_per_byte: float | None
    """On held-out text; None: not measured."""
    load: Lines
    """How to load it."""


def escaped(text: str) -> str:
    """Return strangers' text as Markdown that shows it, on one line."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return shown.translate(_PUNCTUATION)


def hub_licences(expressions: Sequence[str]) -> tuple[list[str], str]:
    """Return what the hub calls some SPDX expressions, each once, and a name for those that it has no word for.

    Returns:
        Identifiers of the hub, among them `other` where it lacks one, and what `other` stands for; empty: nothing.
    """
    found: dict[str, None] = {}
    others: dict[str, None] = {}
    for expression in expressions:
        # Of a choice the whole is named, because a list would read as if all of it held.
        for term in [expression] if " OR " in expression else expression.split(" AND "):
            known = _HUB_LICENCES.get(term)
            if known is None and _HUB_KNOWS.fullmatch(term):
                known = re.sub(r"-(only|or-later)\Z", "", term).lower()
            found[known or "other"] = None
            if known is None:
                others[term] = None
    return list(found), ", ".join(others)


def card_of(held: Held, told: Told) -> str:
    """Return the card, README.md of the folder."""
    from huggingface_hub import ModelCardData

    licences, other = hub_licences([source.license for source in told.sources])
    data = ModelCardData(
        library_name={"hf": "transformers", "safetensors": "p2ptrain"}.get(told.format),
        pipeline_tag=None if held.manifest.own_model is not None else "text-generation",
        tags=["p2ptrain", *(["gguf"] if told.format == "gguf" else [])],
        datasets=[match[1] for source in told.sources if (match := _DATASET.fullmatch(source.url))] or None,
    )
    # As a list where there are several: the library types it as one alone.
    data["license"] = licences[0] if len(licences) == 1 else licences or None
    data["license_name"] = other or None
    return f"---\n{data.to_yaml(line_break=None)}\n---\n\n{_body(held, told)}"


def _body(held: Held, told: Told) -> str:
    manifest, chain = held.manifest, held.chain
    entries = sum(tensor.numel() for tensor in held.tensors.values())
    lines = [
        f"# {escaped(manifest.name)}, round {chain.round:,}",
        "",
        f"A model of {entries:,} trained parameters, from a run of p2ptrain: peers train one model together, with no "
        "server, and all of them end each round with the same bits.",
        "",
        "## Load it",
        "",
        f"```{told.load.language}",
        told.load.text,
        "```",
        "",
        "## Text",
        "",
        *_sources(held, told),
        "",
        "## Training",
        "",
        f"- {chain.round:,} rounds, in which {_counted(chain.total, 'contribution')} of members were summed.",
    ]
    if held.sequences_read is not None:
        lines.append(f"- The peer that wrote this has read {_counted(held.sequences_read, 'sequence')} itself.")
    task = manifest.task_config
    if task is not None and task.kind == "hf":
        lines.append(
            f"- The architecture `{_code(str(task.architecture.get('model_type')))}` of transformers, sequences of "
            f"{manifest.context:,} tokens, a vocabulary of {manifest.vocabulary:,}."
        )
    elif manifest.own_model is None:
        model = manifest.model
        lines.append(
            f"- {_counted(model.layers, 'layer')} of width {model.embedding:,}, {_counted(model.heads, 'head')}, "
            f"sequences of {model.context:,} tokens, a vocabulary of {model.vocabulary:,}."
        )
    if task is not None and task.lora_config is not None:
        lora = task.lora_config
        lines.append(
            f"- Small matrices (LoRA) of rank {lora.rank} and alpha {lora.alpha:g} beside "
            f"{', '.join(f'`{target}`' for target in lora.targets)}; the model of {lora.fixed_parameters:,} parameters "
            "that they belong to was held fixed."
        )
    if task is not None:
        what = "what is held fixed" if task.lora_config is not None else "the first values"
        lines.append(
            f"- Root of {what}: `{task.values.root}`, {task.values.bytes:,} bytes. Where they come from another model, "
            "its licence holds as well; the manifest does not name it."
        )
    lines.append(f"- Strategy `{manifest.optimizer.strategy}`.")
    if told.bits_per_byte is not None:
        lines.append(f"- {told.bits_per_byte:.4f} bits per byte on the run's held-out text.")
    if held.fixed:
        names = ", ".join(f"`{_code(entry.name)}`" for entry in held.fixed[:8])
        more = f" and {len(held.fixed) - 8} more" if len(held.fixed) > 8 else ""
        lines += [
            "",
            f"Not trained, and not in this folder, but the same on every peer: {names}{more}.",
        ]
    lines += [
        "",
        "## Members",
        "",
        f"After round {chain.round:,} these peers are members of the run, by their ids:",
        "",
    ]
    lines += [f"- `{base58.b58encode(member.peer_id).decode()}`" for member in chain.now] or ["- none"]
    facts = {
        "run": held.run_id.hex(),
        "round": str(chain.round),
        "state id": chain.id.hex(),
        "root": held.root.hex(),
        "SHA-256 of the parameters": told.parameters_sha256,
        **{f"SHA-256 of {name}": digest for name, digest in told.files.items()},
        "protocol": str(PROTOCOL_VERSION),
        "p2ptrain": __version__,
        **_versions("torch", *{"hf": ("transformers",), "gguf": ("gguf",)}.get(told.format, ())),
    }
    lines += ["", "## Check it", "", "| | |", "|---|---|"]
    lines += [f"| {name} | `{value}` |" for name, value in facts.items()]
    lines += [
        "",
        "The state id is the hash of the seal that ended this round, and so of all rounds before. The root is the hash "
        "of the parameters, of what the optimizer keeps beside them, and of the place on the chain. Every peer comes "
        "to the same. Whoever has a home that holds this round gets state id, root and hash of the parameters from",
        "",
        "```",
        f"p2ptrain export CHECK --home HOME --round {chain.round} --format safetensors --json",
        "```",
        "",
    ]
    return "\n".join(lines)


def _sources(held: Held, told: Told) -> list[str]:
    data = held.manifest.data
    if not told.sources:
        return ["The peers' own programs chose what it was trained on; the run's manifest names nothing."]
    lines = [f"Trained on {escaped(data.name)}:", ""]
    for source in told.sources:
        facts = [f"licence `{source.license}`"]
        if source.url:
            # What would end a link, or a line of code, is written as its number.
            facts.append(f"<{quote(source.url, safe=':/?#@!$&+,;=%~*')}>")
        if source.attribution:
            facts.append(f"attribution: {escaped(source.attribution)}")
        if source.bytes:
            facts.append(f"{source.bytes:,} bytes")
        if source.sha256:
            facts.append(f"SHA-256 `{source.sha256}`")
        lines.append(f"- **{escaped(source.name)}**: {'; '.join(facts)}")
    lines.append("")
    if told.text is not None:
        lines.append(
            f"These are {_counted(told.text.train_tokens, 'token')} to train on and "
            f"{_counted(told.text.heldout_tokens, 'token')} held out, in {_counted(told.text.documents, 'document')}."
        )
    if data.private:
        lines.append("Each peer also trained on text of its own, which never left its machine and is not listed here.")
    if told.text is not None or data.private:
        lines.append("")
    lines.append(
        "Licences are those of the text, as the run's owner states them in the signed manifest. What they mean for the "
        "model is for you to judge."
    )
    return lines


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _code(text: str) -> str:
    """Return strangers' text for a span of code, where no backslash escapes."""
    return "".join(c if c.isprintable() and c != "`" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _versions(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in packages}
