"""Get a run's text from the first place that has it: the paths given, this home, the package, or the swarm."""

from __future__ import annotations

import logging
import lzma
from collections.abc import Callable
from pathlib import Path

from p2ptrain.config.home import Home
from p2ptrain.config.manifest import DataConfig
from p2ptrain.data.corpus import Corpus, check, load_embedded, load_files, unpack
from p2ptrain.errors import DataError
from p2ptrain.state.files import atomic_write

_logger = logging.getLogger(__name__)


def obtain_corpus(home: Home, config: DataConfig, paths: list[Path] | None, from_swarm: Callable[[], bytes]) -> Corpus:
    """The text that `config` names: from `paths`, this home, the package, or the swarm, in this order.

    Where text is private, training text is what `paths` hold, or held when this home was given any last.

    Raises:
        DataError: nobody has it, or what was given is another text, or none was and it is private.
    """
    if config.private:
        own = _own_text(home, config, paths)
        return Corpus(config.name, config.license, own, _shared_corpus(home, config, from_swarm).heldout)
    if paths:
        return check(load_files(paths, config.name, config.license), config)
    return _shared_corpus(home, config, from_swarm)


def keep_own_text(home: Home, text: bytes) -> None:
    """This home's training text, for runs with private text."""
    atomic_write(home.own_text, lzma.compress(text, preset=6))


def _own_text(home: Home, config: DataConfig, paths: list[Path] | None) -> bytes:
    if paths:
        files = load_files(paths, config.name, config.license)
        keep_own_text(home, files.train + files.heldout)
        return files.train + files.heldout
    try:
        return lzma.decompress(home.own_text.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"each peer of this run trains on text of its own, and home {home.path} has none",
            hint="again with --data PATH; it stays on this machine",
        ) from error
    except (OSError, lzma.LZMAError, EOFError) as error:
        raise DataError(
            f"{home.own_text} cannot be read: {error}", hint="give the text again with --data PATH"
        ) from error


def _shared_corpus(home: Home, config: DataConfig, from_swarm: Callable[[], bytes]) -> Corpus:
    """What peers hand out; without training text where that is private."""
    copy = home.corpus(shared_sha256(config))
    if copy.exists():
        try:
            return unpack(copy.read_bytes(), config)
        except DataError as error:
            _logger.warning("%s is damaged and fetched anew: %s", copy, error)
            copy.unlink(missing_ok=True)
    embedded = load_embedded()
    if shared_sha256(config) in ("", shared_sha256(embedded.config(private=config.private))):
        return check(embedded, config)
    packed = from_swarm()
    corpus = unpack(packed, config)
    atomic_write(copy, packed)
    return corpus


def shared_sha256(config: DataConfig) -> str:
    """Names what peers hand out: the hash of the training text, or of the held-out text where that is private."""
    return config.heldout_sha256 if config.private else config.sha256
