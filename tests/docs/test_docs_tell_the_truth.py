"""What the documents say of the code is true of it: versions, calls, commands, flags, exit codes, paths and figures."""

from __future__ import annotations

import ast
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import msgspec
import pytest
import typer

import p2ptrain
from p2ptrain import errors
from p2ptrain.cli.main import app
from p2ptrain.config.manifest import PROTOCOL_VERSION, GroupConfig
from p2ptrain.observe import events
from p2ptrain.optim.directions import DIRECTIONS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "p2ptrain"
DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
MODULES = sorted(PACKAGE.rglob("*.py"))

#: folders of a user's machine; keys in the DHT are no paths either
NOT_IN_THE_TREE = {"checkpoints/", "journal/", "own/", "data/", "events/", "seals/", "texts/", "demo-output/"}
#: the first words of commands that are not this project's
FOREIGN = {"torchrun", "pip", "git", "sudo", "cd", "make", "ruff", "mypy", "pytest", "python -m pytest"}
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def spans(text: str) -> Iterator[str]:
    """Yield each code span and each line of fenced code, continued lines joined and comments cut off."""
    fenced = re.compile(r"^```.*?^```", re.M | re.S)
    for block in fenced.findall(text):
        for line in block.replace("\\\n", " ").splitlines()[1:-1]:
            yield line.split(" # ")[0].strip()
    for span in re.findall(r"`([^`]+)`", fenced.sub("", text)):
        yield " ".join(span.split())


def commands() -> dict[str, set[str]]:
    """Return the flags of each command of `p2ptrain`, by its name; those of `p2ptrain` itself under the empty name."""
    group = typer.main.get_command(app)
    flags = {"": {flag for parameter in group.params for flag in parameter.opts} | {"--help"}}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        flags[name] = {"--help"} | {flag for p in command.params for flag in [*p.opts, *p.secondary_opts]}
    return flags


def flags_of_script(path: Path) -> set[str]:
    """Return the flags that a script's text names; some of those of a benchmark stand in what benchmarks share."""
    shared = [p.read_text() for p in (path.parent / "lab").glob("*.py")]
    return {flag for text in [path.read_text(), *shared] for flag in re.findall(r'"(--[a-z-]+)"', text)}


def exists(path: str, *near: Path) -> bool:
    """Say whether `path` is in the tree: from its root, the package, the docs, `near`, or as the end of a path."""
    path, _, name = path.partition(":")
    found = [base / path for base in (ROOT, PACKAGE, ROOT / "docs", *near) if (base / path).exists()]
    if not found and not path.endswith("/"):
        found = [p for top in ("p2ptrain", "tests", "scripts", "docs") for p in (ROOT / top).rglob(path)]
    return bool(found) and (not name or any(re.search(rf"\b{name}\b", p.read_text()) for p in found if p.is_file()))


def headings(path: Path) -> set[str]:
    """Return what links name the headings of a document by."""
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    }


def is_path(span: str) -> bool:
    """Say whether a code span is meant as a path in the tree: no placeholder in capitals, no pattern, no flag."""
    if span in NOT_IN_THE_TREE or span.startswith("p2ptrain/1/") or not re.fullmatch(r"[a-z0-9_./-]+(:\w+)?", span):
        return False
    is_file = re.search(r"\w\.(py|md)(:\w+)?$", span)
    is_below = re.fullmatch(r"(\.?[a-z0-9_]+/)+([\w-]+(\.[a-z]+)?)?(:\w+)?", span)
    return bool(is_file or is_below)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_path_and_every_link_leads_somewhere(path: Path) -> None:
    text = path.read_text()
    missing = [span for span in spans(text) if is_path(span) and not exists(span)]
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, heading = target.partition("#")
        to = path.parent / name if name else path
        if not target.startswith("http") and not (to.exists() and (not heading or heading in headings(to))):
            missing.append(target)
    assert not missing


def defined_in(path: Path) -> set[str]:
    """Return the functions, classes, methods and constants that a module defines, methods as `Class.method`."""
    found = set()

    def look(body: list[ast.stmt], owner: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(owner + node.name)
            if isinstance(node, ast.ClassDef):
                look(node.body, f"{owner}{node.name}.")
            targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
            found.update(owner + target.id for target in targets if isinstance(target, ast.Name))

    look(ast.parse(path.read_text()).body, "")
    return found


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_function_that_a_document_names_is_there(path: Path) -> None:
    everywhere = {name for module in MODULES for name in defined_in(module)}
    tests = {name for module in (ROOT / "tests").rglob("test_*.py") for name in defined_in(module)}
    missing = []
    for span in spans(path.read_text()):
        of_file = re.fullmatch(r"((?:[a-z_]+/)+[a-z_]+\.py):([\w.]+)", span)
        if of_file:
            modules = [base / of_file[1] for base in (ROOT, PACKAGE) if (base / of_file[1]).exists()]
            missing += [] if modules and of_file[2] in defined_in(modules[0]) else [span]
        elif re.fullmatch(r"[A-Z][A-Za-z]+\.[a-z_]\w*|test_\w+", span) and span not in everywhere | tests:
            missing.append(span)
    assert not missing


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_command_and_every_flag_is_there(path: Path) -> None:
    known = commands()
    scripts = {flag for script in (ROOT / "scripts").rglob("*.py") for flag in flags_of_script(script)}
    anywhere = set().union(*known.values()) | scripts
    wrong = []
    for span in spans(path.read_text()):
        if any(span == word or span.startswith(word + " ") for word in FOREIGN):
            continue
        script = re.search(r"(?:^|\s)((?:scripts/)(?:\w+/)*\w+\.py)(.*)", span)
        command = re.search(r"(?:^|\s)p2ptrain ([a-z]+)\b(.*)", span)
        if script:
            allowed = flags_of_script(ROOT / script[1]) if (ROOT / script[1]).exists() else set()
        elif command:
            if command[1] not in known:
                wrong.append(span)
            allowed = known.get(command[1], set())
        else:
            allowed = anywhere
        wrong += [f"{span}: {flag}" for flag in FLAG.findall(span) if flag not in allowed]
    assert not wrong


def exit_codes() -> list[list[str]]:
    """Return the cells of the table of exit codes in docs/cli.md, row by row."""
    section = (ROOT / "docs/cli.md").read_text().split("## Exit codes")[1]
    return [[cell.strip() for cell in row.split("|")] for row in re.findall(r"^\|(.*)\|$", section, re.M)][2:]


def test_the_exit_codes_are_those_of_the_errors() -> None:
    listed = {int(row[0]) for row in exit_codes() if row[0].isdecimal()}
    raised = {c.exit_code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.P2PTrainError)}
    # The others are not errors of ours: done, an invariant that `simulate` found broken, Ctrl-C.
    assert listed == raised | {0, 13, 130}


def test_every_message_that_the_table_of_exit_codes_quotes_is_in_the_code() -> None:
    texts = [" ".join(text.split()) for path in MODULES for text in texts_of(path)]
    quoted = [part for row in exit_codes() for part in re.findall(r"`([^`]+)`", row[1])]
    assert len(quoted) > 30
    assert not [part for part in quoted if not any(part.strip(". ") in text for text in texts)]


def texts_of(path: Path) -> Iterator[str]:
    """Yield each string of a module, with ... in the place of what is put into it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_protocol_is_of_the_version_that_the_code_speaks() -> None:
    title = (ROOT / "docs/protocol.md").read_text().splitlines()[0]
    assert title == f"# Protocol, version {PROTOCOL_VERSION}"


def test_the_protocol_lists_the_calls_that_a_peer_answers() -> None:
    text = (ROOT / "docs/protocol.md").read_text().split("## 3. Calls")[1].split("\n## ")[0]
    methods = {
        node.name.removeprefix("rpc_"): ast.unparse(node.returns) if node.returns else ""
        for node in ast.walk(ast.parse((PACKAGE / "calls/servicer.py").read_text()))
        if isinstance(node, ast.AsyncFunctionDef) and node.name.startswith("rpc_")
    }
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == set(methods)
    unary = re.search(r"\. ((?:`\w+`(?:, | and )?)+) are unary", " ".join(text.split()))
    assert unary is not None
    assert set(re.findall(r"`(\w+)`", unary[1])) == {
        name for name, returns in methods.items() if returns == "BytesValue"
    }


def test_the_events_that_are_written_are_those_that_are_described() -> None:
    text = (ROOT / "docs/watching.md").read_text().split("## Events")[1]
    listed = {
        kind: set(re.findall(r"`(\w+)`", fields))
        for kind, fields in re.findall(r"^\| `(\w+)` \|[^|]*\|(.*)\|$", text, re.M)
    }
    written = {str(kind.__struct_config__.tag): {*kind.__struct_fields__} - {"t", "v"} for kind in events.KINDS}
    assert listed == written


def test_protocol_manifest_and_code_know_the_same_directions() -> None:
    text = (ROOT / "docs/protocol.md").read_text().split("### The step")[1].split("\n### ")[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", text, re.M))
    field = next(field for field in msgspec.structs.fields(GroupConfig) if field.name == "direction")
    assert listed == set(get_args(field.type)) == set(DIRECTIONS)


def test_the_architecture_lists_every_module_and_no_other() -> None:
    section = (ROOT / "docs/architecture.md").read_text().split("## Where things are")[1].split("\n## ")[0]
    listed: set[str] = set()
    package = ""
    for first, second in re.findall(r"^\|([^|]*)\|([^|]*)\|", section, re.M):
        package = next(iter(re.findall(r"`([\w/]+/)`", first)), package if not first.strip() else "")
        listed |= set(re.findall(r"`(\w+)`", first))
        listed |= {f"{package}{name}" for name in re.findall(r"`(\w+)`", second)}
    modules = {
        str(p.relative_to(PACKAGE).with_suffix("")) for p in MODULES if p.name not in ("__init__.py", "__main__.py")
    }
    assert listed == modules


def said_in(path: Path) -> Iterator[str]:
    """Yield every docstring and every comment of a module."""
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield re.sub(r"https?://\S+", "", node.value.value)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_that_a_docstring_names_is_there(path: Path) -> None:
    missing = []
    for text in said_in(path):
        for name in re.findall(r"(?<![\w/.])(?:[a-z_]+/)*[a-z_0-9]+\.(?:py|md)\b", text):
            if not exists(name, path.parent, path.parent.parent):
                missing.append(name)
        for name in re.findall(r"\bp2ptrain(?:\.[a-z_]+)+", text):
            *parents, last = name.split(".")
            if parents == ["p2ptrain"] and last in p2ptrain.__all__:
                continue
            module = ROOT.joinpath(*parents)
            if (
                not (module / last).is_dir()
                and not (module / f"{last}.py").exists()
                and not module.with_suffix(".py").exists()
            ):
                missing.append(name)
    assert not missing


def test_every_rule_that_the_code_cites_is_there() -> None:
    rules = set(re.findall(r"^## (\d+)\. ", (ROOT / "docs/rounds.md").read_text(), re.M))
    assert rules == {str(number) for number in range(1, 15)}
    pure = [path for path in MODULES if path.parent.name in ("rounds", "chain")]
    cited = [n for path in pure for n in re.findall(r"\b[Rr]ules? (\d+)", path.read_text())]
    assert len(cited) > 10 and set(cited) <= rules


def made_by(script: str) -> None:
    """Assert that what a script writes into the documents is there."""
    command = [sys.executable, str(ROOT / "scripts" / script), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_table_is_that_of_its_result_file() -> None:
    made_by("make_tables.py")


def test_the_reference_of_commands_is_that_of_the_code() -> None:
    made_by("make_cli.py")


#: in one process, as each takes a second to start
RUN_LINES = """\
import os, shlex, subprocess, sys
from p2ptrain.cli.main import run
for line in sys.argv[1:]:
    before, _, command = line.rpartition(" | ")
    if before:
        feed = subprocess.Popen(before, shell=True, stdout=subprocess.PIPE)
        os.dup2(feed.stdout.fileno(), 0)
    try:
        run(shlex.split(command)[1:])
    except SystemExit as end:
        if end.code:
            sys.exit(f"{line}: {end.code}")
"""


def test_the_commands_on_data_do_what_they_say(tmp_path: Path) -> None:
    """All but those that need the network, one after another in one folder."""
    text = "\n\n".join(f"Dear reader, this is letter {number} of many." * 3 for number in range(200))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "all.txt").write_text(text)
    records = "".join(json.dumps({"body": paragraph}) + "\n" for paragraph in text.split("\n\n"))
    (tmp_path / "docs.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    (tmp_path / "more.txt.gz").write_bytes(gzip.compress(text.encode()))
    shutil.copy(PACKAGE / "data/embedded/tokenizer.json", tmp_path)
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "docs/data.md").read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    mine = [line for line in lines if not line.startswith("p2ptrain bootstrap")]
    assert len(mine) == len(lines) - 1 >= 7
    environment = {**os.environ, "P2PTRAIN_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", RUN_LINES, *mine],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "attribution A. Reader" in done.stdout and "https://example.org/letters" in done.stdout


def test_the_commands_on_models_do_what_they_say(tmp_path: Path) -> None:
    """All that need neither the network nor a home in which a run was trained."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=4096, max_position_embeddings=32, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    shutil.copy(PACKAGE / "data/embedded/tokenizer.json", tmp_path / "llama")
    shutil.copy(tmp_path / "llama" / "config.json", tmp_path)
    (tmp_path / "letters").write_text("\n\n".join(f"Dear reader, this is letter {n} of many." * 3 for n in range(200)))
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "docs/own-model.md").read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("p2ptrain init")]
    mine = [line for line in lines if "old-home" not in line]
    assert len(mine) == len(lines) - 1 == 4
    environment = {**os.environ, "P2PTRAIN_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", RUN_LINES, *mine],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "are trained, beside a model that is held fixed" in done.stdout
