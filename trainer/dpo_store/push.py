"""Pushes files to a branch of the Hugging Face Hub, through huggingface_hub: all of them in one commit, or none.

The hub keeps files by their content. A file that it has is not sent again, so a push that broke off goes on with the
file that it had reached, and a push of what the branch holds already makes no commit. The token is huggingface_hub's
own choice, as for reading: see ``hub``.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dpo_api.errors import AccessDeniedError, InvalidModelError, NotFoundError, StorageUnavailableError
from dpo_store import hub
from dpo_store.errors import Rule
from dpo_store.options import MIB, ObjectInfo, RetryPolicy, Timing
from dpo_store.retry import Patience
from dpo_store.store import Store
from dpo_store.uris import local_path_of

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

_IN_MEMORY: Final = 32 * MIB
"""An object up to this size is read into memory to be sent; a larger one is copied to a file first."""
_READ_ONLY: Final = Rule(
    AccessDeniedError, retry=False, text="the token may not write to this repository; give it write access"
)


def explain(error: BaseException) -> tuple[Rule, str] | None:
    """Return what an exception means for a push; None if it is not about the hub."""
    if getattr(getattr(error, "response", None), "status_code", None) == 403:
        return _READ_ONLY, _READ_ONLY.text
    if isinstance(error, RuntimeError | ConnectionError):  # what hf_xet raises when a transfer fails
        return hub.LOST, f"{hub.LOST.text}: {str(error).partition('\n')[0][:300]}"
    return hub.explain(error)


class Branch:
    """A branch of a model's repository on the hub, to write to."""

    def __init__(
        self, repository: str, revision: str, *, policy: RetryPolicy | None = None, timing: Timing | None = None
    ) -> None:
        """Cheap: nothing is asked yet. repository: ``org/name``."""
        self.repository = repository
        self.revision = revision
        self.uri = f"hf://{repository}@{revision}"
        self._policy = policy or RetryPolicy()
        self._timing = timing or Timing()

    @property
    def server(self) -> str:
        """The address of the hub: the public one, or what HF_ENDPOINT names."""
        return str(hub.api().endpoint)

    def _run[T](self, attempt: Callable[[], T], subject: str = "") -> T:
        return Patience(subject or self.uri, self._policy, self._timing, explain).run(attempt)

    def check(self) -> bool:
        """Return whether the repository exists, and is one that the token may write to. Changes nothing.

        Raises AccessDeniedError if there is no token, a wrong one, or one that may not write to the repository or, if
        there is none, not create it. Of a token with permissions of its own for each repository, only the hub's answer
        to ``create`` says the last.
        """
        api = hub.api()
        from huggingface_hub import get_token

        if get_token() is None:
            raise AccessDeniedError(
                f"{self.uri}: a push needs an access token, and there is none; set HF_TOKEN (on a cluster"
                " storage.hub.tokenSecretRef) or log in with `hf auth login`"
            )
        try:
            self._run(lambda: api.auth_check(self.repository, write=True))
        except NotFoundError:  # or it is private and not for this token
            self._check_owner(self._run(api.whoami))
            return False
        return True

    def _check_owner(self, account: Mapping[str, Any]) -> None:
        """Check that the token's account may create the repository. account: what the hub says of it."""
        name, owner = str(account.get("name")), self.repository.partition("/")[0]
        role = account.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise AccessDeniedError(f"{self.uri}: the token of {name} may only read; use one that may write")
        owners = {name, *(str(member.get("name")) for member in account.get("orgs", ()))}
        if owner.casefold() not in {each.casefold() for each in owners}:
            raise AccessDeniedError(
                f"{self.uri}: there is no such repository that the token may see, and its account {name} is not {owner}"
                " or a member of it, so it cannot create it"
            )

    def create(self, *, private: bool) -> None:
        """Create the repository and the branch if they do not exist. Raises as ``check`` does.

        private: whether a new repository is.
        """
        api = hub.api()
        if not self.check():
            self._run(lambda: api.create_repo(self.repository, private=private, exist_ok=True))
            self._run(lambda: api.auth_check(self.repository, write=True))
        if self.revision != "main":
            self._run(lambda: api.create_branch(self.repository, branch=self.revision, exist_ok=True))

    def push(
        self,
        files: Mapping[str, ObjectInfo],
        store: Store,
        *,
        title: str,
        is_stale: Callable[[str], bool],
        progress: Callable[[int, str], None],
    ) -> str:
        """Make the branch hold ``files``, and return its commit: a new one, unless it holds them already.

        files: objects of ``store`` by their path in the repository. title: of a new commit. is_stale: whether another
        file of the branch, given by its path, is to be deleted. progress: called with each file's number, from 1, and
        path before it is sent. Takes disk space (TMPDIR) for one file at a time if they are not local.
        """
        api = hub.api()
        with tempfile.TemporaryDirectory(prefix="dpo-push-") as folder:
            sent = []
            for number, (path, info) in enumerate(files.items(), 1):
                progress(number, path)
                sent.append(self._sent(api, path, info, store, Path(folder) / str(number)))
            try:
                return self._run(lambda: self._commit(api, sent, title, is_stale))
            except ValueError as error:  # huggingface_hub's, for a card that the hub refuses
                raise InvalidModelError(f"{self.uri}: {' '.join(str(error).split())}") from error

    def _sent(self, api: HfApi, path: str, info: ObjectInfo, store: Store, copy: Path) -> CommitOperationAdd:
        """Send a file's content, unless the hub has it or wants it in the commit itself. copy: a path to use."""
        from huggingface_hub import CommitOperationAdd

        content: str | bytes
        if (local := local_path_of(info.uri, store.options.pvc_root)) is not None:
            content = str(local)
        elif info.size <= _IN_MEMORY:
            content = store.read(info)
        else:
            store.download(info, copy)
            content = str(copy)

        def attempt() -> CommitOperationAdd:
            addition = CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)
            api.preupload_lfs_files(self.repository, [addition], revision=self.revision)
            return addition

        addition = self._run(attempt, f"{self.uri}/{path}")
        if addition.path_or_fileobj != str(copy):  # it is not needed again
            copy.unlink(missing_ok=True)
        return addition

    def _commit(self, api: HfApi, sent: list[CommitOperationAdd], title: str, is_stale: Callable[[str], bool]) -> str:
        """Commit what the branch lacks, if anything. If the answer to a commit was lost, the next try finds it done."""
        from huggingface_hub import CommitOperationDelete

        commit, there = self._tree(api)
        wanted = {addition.path_in_repo for addition in sent}
        gone = [CommitOperationDelete(path) for path in there if path not in wanted and is_stale(path)]
        if not gone and not _missing(there, sent):
            return commit
        # With parent_commit, a try whose predecessor reached the hub after all is refused instead of repeated.
        api.create_commit(
            self.repository, [*sent, *gone], commit_message=title, revision=self.revision, parent_commit=commit
        )
        commit, there = self._tree(api)
        if missing := _missing(there, sent):
            raise StorageUnavailableError(
                f"{self.uri}: the hub did not take {missing[0]} into commit {commit}; is it in the repository's"
                " .gitignore, or does somebody else write to the branch?"
            )
        return commit

    def _tree(self, api: HfApi) -> tuple[str, dict[str, Any]]:
        """Return the branch's commit, and its files by path."""
        commit = api.repo_info(self.repository, revision=self.revision).sha
        if commit is None:
            raise StorageUnavailableError(f"{self.uri}: the hub names no commit")
        entries = api.list_repo_tree(self.repository, recursive=True, revision=commit)
        return commit, {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}  # not folders


def _missing(there: Mapping[str, Any], sent: list[CommitOperationAdd]) -> list[str]:
    """Return the paths of what was sent that the branch does not hold with the same content."""
    return [each.path_in_repo for each in sent if not _is_same(there.get(each.path_in_repo), each)]


def _is_same(entry: Any, addition: CommitOperationAdd) -> bool:
    if entry is None or entry.size != addition.upload_info.size:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == addition.upload_info.sha256.hex())
    with addition.as_file() as file:
        data = file.read()
    # Git's name of a file's content.
    return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest())
