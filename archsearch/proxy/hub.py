"""The Hugging Face hub: datasets as a stream, and pretrained tokenizers.

The hub is asked once, with a time limit, before anything else: without a network the error comes at once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from archsearch.errors import ArchsearchError, ConfigError, EnvironmentUnfit
from archsearch.proxy.sources import Document
from archsearch.proxy.text_files import find_files, missing_field, record, stamp

if TYPE_CHECKING:
    import datasets

SECONDS = 10.0
"""Time that the hub has to answer the first question."""
T = TypeVar("T")


class HubSource:
    """A Hugging Face dataset, ``OWNER/NAME[/CONFIG][@REVISION]``, or a local folder of one; rows in its own order.

    Each row is a document, held out by its content. The dataset is read as a stream, so that no more of
    it is fetched than ``proxy.corpus_tokens`` asks for.

    Args:
        path: what follows ``hf:``.
        split: of the dataset.
        text_field: the column with the text.
    """

    def __init__(self, path: str, split: str, text_field: str) -> None:
        self.name, self.split, self.text_field = f"hf:{path}", split, text_field
        path, _, self.revision = path.partition("@")
        self.local = Path(path).expanduser() if path.startswith(("/", ".", "~")) else None
        owner, _, rest = path.partition("/")
        name, _, self.config = rest.partition("/")
        self.repo = f"{owner}/{name}" if name else owner
        if self.local is None and (not owner or path.endswith("/")):
            raise ConfigError(f"{self.name} names no dataset", "write hf:OWNER/NAME or hf:OWNER/NAME/CONFIG")

    def fingerprint(self) -> dict[str, Any]:
        """The request. A dataset of the hub stays as it was cached; another ``@REVISION`` is another one."""
        request = {"hf": self.name, "split": self.split, "text_field": self.text_field}
        if self.local is None:
            return request
        root, paths = find_files(str(self.local))
        return {**request, "files": sorted([path.relative_to(root).as_posix(), *stamp(path)] for path in paths)}

    def documents(self) -> Iterator[Document]:
        rows = iter(self._open())
        known = False
        while (row := self._guard(lambda: next(rows, None))) is not None:
            if not known and self.text_field not in row:
                raise missing_field(self.name, self.text_field, list(row))
            known = True
            if row[self.text_field] is None:
                continue
            if (document := record(row[self.text_field], self.name, self.text_field)) is not None:
                yield document

    def _open(self) -> datasets.IterableDataset:
        what = str(self.local) if self.local else self.repo
        if self.local is None:
            # All passes over the dataset read the same commit.
            self.revision = ask_hub(self.name, "dataset", self.repo, self.revision or None)
        try:
            import datasets
        except ImportError:
            raise EnvironmentUnfit(f"{self.name} needs datasets", "pip install 'archsearch[data]'") from None
        datasets.disable_progress_bars()
        options: dict[str, Any] = {"name": self.config or None} if self.local is None else {}
        if self.revision:
            options["revision"] = self.revision
        return self._guard(lambda: datasets.load_dataset(what, split=self.split, streaming=True, **options))

    def _guard(self, action: Callable[[], T]) -> T:
        """``action()``, its errors as ours."""
        try:
            return action()
        except ArchsearchError:
            raise
        except (OSError, ValueError) as error:  # what the library raises for data that is missing or malformed
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            if isinstance(error, ConnectionError):
                raise no_network(self.name, reason) from None
            remedy = "correct proxy.data, proxy.split or proxy.text_field"
            raise ConfigError(f"cannot read {self.name}: {reason}", remedy) from None
        except Exception as error:
            if _is_network(error):
                raise no_network(self.name, _reason(error)) from None
            raise


def fetch_tokenizer(name: str, folder: Path) -> None:
    """Put ``tokenizer.json`` and ``tokenizer_config.json`` of a pretrained name, ``NAME[@REVISION]``, into ``folder``.

    Raises:
        ConfigError: the hub has no such name, or it has no ``tokenizer.json``.
        EnvironmentUnfit: not on this machine, and no network.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    repo, _, revision = name.partition("@")

    def fetch(file: str, **options: Any) -> None:
        shutil.copy(hf_hub_download(repo, file, **options), folder / file)

    try:
        options: dict[str, Any] = {"revision": revision or None, "local_files_only": True}
        fetch("tokenizer.json", **options)
    except HFValidationError:
        remedy = "give bytes, bpe, a tokenizer.json or a pretrained name"
        raise ConfigError(f"proxy.tokenizer: {name!r} is no file and no name of a tokenizer", remedy) from None
    except LocalEntryNotFoundError:
        options = {"revision": ask_hub(f"the tokenizer {name}", "model", repo, revision or None)}
        try:
            fetch("tokenizer.json", **options)
        except EntryNotFoundError:
            raise ConfigError(f"{name} has no tokenizer.json", "give a tokenizer.json of your own") from None
    with suppress(EntryNotFoundError):
        fetch("tokenizer_config.json", **options)


def ask_hub(what: str, kind: str, repo: str, revision: str | None) -> str:
    """The commit of a repository on the hub.

    Raises:
        ConfigError: there is none, or it is not for this user.
        EnvironmentUnfit: no answer, or the network is forbidden.
    """
    if offline():
        raise no_network(what, "HF_HUB_OFFLINE forbids the network")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        info = HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=SECONDS)
        return str(info.sha)
    except OfflineModeIsEnabled as error:
        raise no_network(what, _reason(error)) from None
    except HFValidationError as error:
        raise ConfigError(f"{what}: {_reason(error)}", "write OWNER/NAME") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status >= 500 or status in (0, 408, 429):
            raise no_network(what, f"the hub answers {status}: {_reason(error)}") from None
        raise ConfigError(f"{what}: {_reason(error)}", "check the name; log in with `hf auth login`") from None
    except Exception as error:
        if _is_network(error):
            raise no_network(what, f"the hub does not answer: {_reason(error)}") from None
        raise


def _is_network(error: Exception) -> bool:
    """Whether an HTTP client raised it: the hub's libraries let their clients' errors through."""
    clients = ("httpx", "requests", "aiohttp", "httpcore", "urllib3", "socket", "ssl")
    kinds = type(error).__mro__
    return isinstance(error, OSError | TimeoutError) or any(kind.__module__.startswith(clients) for kind in kinds)


def _reason(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def offline() -> bool:
    """Whether the user forbade the network, in the Hugging Face libraries' own variables."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def no_network(what: str, reason: str) -> EnvironmentUnfit:
    """The error for something that only the network has."""
    remedy = "prepare it with `archsearch data` where there is a network and bring the cache folder along"
    return EnvironmentUnfit(f"{what} is not on this machine: {reason}", remedy)
