"""The states of many users, few of them in memory and the others on disk.

    store = StateStore("states", model, capacity=100)
    state = store.gather(["ann", "bob"])               # a new user begins with an empty memory
    logits, state = model(tokens, state)
    store.scatter(["ann", "bob"], state)
    store.flush()                                      # before the process ends

A state that was evicted and restored is equal, bit for bit, to one that stayed. To make that so, the keys and values that
`model.step` keeps for the open window are dropped on the way in; it computes them anew.

On disk each user has a file of their own, named by a hash, so that a name may be any text, "../../etc" included. It is written before
the state leaves memory, whole or not at all. What is neither evicted nor flushed is lost when the process is killed: the file still
holds the user's state as it was last written.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from remanence.context.state import ContextState, load_context_state, save_context_state
from remanence.errors import DataError, SettingError, StateMismatchError
from remanence.state import State, load_values, sync, write_whole

_FORMAT, _CLAIM, _SUFFIX = "remanence context store", "store.json", ".safetensors"


class _Model(Protocol):
    config: Any

    @property
    def device(self) -> torch.device: ...

    def init_state(self, batch: int) -> Any: ...

    def restore_state(self, state: State) -> Any: ...


class UnknownUserError(DataError, KeyError):
    """Nothing was stored under this name."""

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return str(self.args[0])


class StateStore:
    """One-row states by user; the least recently used leave memory first.

    One process at a time may write to a folder.

    Args:
        folder: where states lie; made when absent.
        model: whose states they are, anything with `config`, `device`, `init_state` and `restore_state`. The fingerprint of its
            configuration is checked; whether its weights are those that wrote the states is not.
        capacity: states in memory at most, 1 or more; each takes `state.nbytes("all")` bytes.

    Raises:
        SettingError: `capacity` is below 1.
        StateMismatchError: the folder holds states of a model with another configuration, or something else.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from remanence.context import TransformerXL, TransformerXLConfig
        >>> model = TransformerXL(TransformerXLConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, window=4, cache=4))
        >>> with TemporaryDirectory() as folder:
        ...     store = StateStore(folder, model, capacity=1)
        ...     store["ann"], store["bob"] = model.init_state(2).split()
        ...     len(store), "ann" in store, sorted(store)
        (2, True, ['ann', 'bob'])
    """

    def __init__(self, folder: str | Path, model: _Model, capacity: int) -> None:
        if capacity < 1:
            raise SettingError(f"StateStore: capacity={capacity} must be 1 or more.")
        self.folder, self.model, self.capacity = Path(folder).expanduser(), model, capacity
        self._held: dict[str, Any] = {}  # least recently used first
        self._unsaved: set[str] = set()
        self._shapes = _shapes(model.init_state(1))
        self._claim()

    def _claim(self) -> None:
        """Note whose folder this is; refuse another's."""
        path = self.folder / _CLAIM
        own = {"format": _FORMAT, "model_type": self.model.config.model_type, "fingerprint": self.model.config.fingerprint()}
        if not path.exists():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise StateMismatchError(f"{self.folder} exists and is no store of states; name a new folder.")
            write_whole(path, json.dumps(own, indent=1))
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            theirs = f"a '{found['model_type']}' with the fingerprint {found['fingerprint']}"
        except (ValueError, KeyError, TypeError) as error:
            raise StateMismatchError(f"{path} cannot be read ({error!r}); delete it if the states beside it are this model's.") from error
        if found != own:
            raise StateMismatchError(
                f"{self.folder} holds states of {theirs}, this model is a '{own['model_type']}' with {own['fingerprint']}. Open it with "
                f"its own model, or name a new folder."
            )

    # --- one user ----------------------------------------------------------------------------------------------

    def __getitem__(self, user: str) -> Any:
        """The user's state; leave its tensors as they are.

        Raises:
            DataError: nothing was stored under this name; it is a KeyError too.
            StateMismatchError: the user's file is broken, or is another's.
        """
        if user not in self._held:
            self._held[user] = self._restored(user)
        self._held[user] = self._held.pop(user)  # to the end: most recently used
        self._evict()
        return self._held[user]

    def __setitem__(self, user: str, state: ContextState) -> None:
        """Store a copy of a state of one row.

        Raises:
            DataError: it has another number of rows or belongs to another model, or the name is no str.
        """
        if not isinstance(user, str):
            raise DataError(f"StateStore: {user!r} is a {type(user).__name__}; users are named by a str.")
        if _shapes(state) != self._shapes:
            raise DataError(
                f"StateStore: the state of '{user}' is a {type(state).__name__} of {state.batch} rows; give one row of this model's, "
                f"see `state.split()`."
            )
        self._held.pop(user, None)
        self._held[user] = replace(state, cache=None).fork().to(self.model.device)
        self._unsaved.add(user)
        self._evict()

    def __delitem__(self, user: str) -> None:
        """Forget a user, in memory and on disk.

        Raises:
            DataError: nothing was stored under this name; it is a KeyError too.
        """
        if user not in self:
            raise self._unknown(user)
        self._path(user).unlink(missing_ok=True)
        sync(self.folder)
        self._held.pop(user, None)
        self._unsaved.discard(user)

    def __contains__(self, user: object) -> bool:
        return isinstance(user, str) and (user in self._held or self._path(user).exists())

    def __len__(self) -> int:
        n_files = sum(1 for _ in self.folder.glob(f"*{_SUFFIX}"))
        return n_files + sum(not self._path(user).exists() for user in self._unsaved)

    def __iter__(self) -> Iterator[str]:
        """All users, in alphabetical order; reads the header of every file."""
        on_disk = {self._owner(path) for path in self.folder.glob(f"*{_SUFFIX}")}
        return iter(sorted(on_disk | self._unsaved))

    # --- batches -----------------------------------------------------------------------------------------------

    def gather(self, users: Sequence[str]) -> Any:
        """The states of several users as one; a user of whom nothing is stored begins with an empty memory.

        Args:
            users: B distinct names.

        Returns:
            A state of B rows, in their order; the store keeps its own copy.

        Raises:
            DataError: there is no user, or one twice.
            StateMismatchError: a user's file is broken, or is another's.
        """
        self._require_distinct(users)
        return ContextState.join([self[user] if user in self else self.model.init_state(1) for user in users])

    def scatter(self, users: Sequence[str], state: ContextState) -> None:
        """Store a row for each user; the inverse of `gather`.

        Raises:
            DataError: there is no user, or one twice, or the state has another number of rows.
        """
        self._require_distinct(users)
        if state.batch != len(users):
            raise DataError(f"StateStore: a state of {state.batch} rows for {len(users)} users; give a row for each.")
        for user, row in zip(users, state.split(), strict=True):
            self[user] = row

    def flush(self) -> None:
        """Write every state that is not on disk as it is in memory."""
        for user in sorted(self._unsaved):
            self._write(user)

    # --- disk --------------------------------------------------------------------------------------------------

    def _evict(self) -> None:
        while len(self._held) > self.capacity:
            user = next(iter(self._held))
            self._write(user)  # first; when it fails the state stays in memory
            del self._held[user]

    def _write(self, user: str) -> None:
        if user in self._unsaved:
            save_context_state(self._path(user), self._held[user], self.model, about={"user": user})
            self._unsaved.remove(user)

    def _restored(self, user: str) -> Any:
        if user not in self:
            raise self._unknown(user)
        path = self._path(user)
        if self._owner(path) != user:
            raise StateMismatchError(f"{path} holds the state of '{self._owner(path)}', not of '{user}'; files of a store are not renamed.")
        return load_context_state(path, self.model)

    def _owner(self, path: Path) -> str:
        about = load_values(path).get("about")
        if not (isinstance(about, dict) and isinstance(about.get("user"), str)):
            raise StateMismatchError(f"{path} does not say whose state it holds, and was not written by a StateStore; take it away.")
        return str(about["user"])

    def _path(self, user: str) -> Path:
        return self.folder / (hashlib.sha256(user.encode("utf-8", "surrogatepass")).hexdigest() + _SUFFIX)

    def _unknown(self, user: str) -> UnknownUserError:
        others = f"but of {len(self)} other users"
        return UnknownUserError(f"the store in {self.folder} holds no state of '{user}', {others}; `in` tells beforehand.")

    @staticmethod
    def _require_distinct(users: Sequence[str]) -> None:
        twice = sorted(user for user, times in Counter(users).items() if times > 1)
        if not users or twice:
            raise DataError(f"StateStore: {len(users)} users{f', {twice} more than once' if twice else ''}; give one or more, each once.")


def _shapes(state: ContextState) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.state_dict().items()}
