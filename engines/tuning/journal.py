"""What a search has found out, kept on disk: a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LARGEST = 50_000_000


class Journal:
    """Results by what they are of, a line of JSON each.

    A search that is run again asks for the same in the same order, and gets what is there.

    Args:
        file: is kept, and continued where it is of the same work; else begun anew.
        work: what is searched with what; anything JSON has.
    """

    def __init__(self, file: Path, work: Any) -> None:
        self.file, self._known = file, dict[str, Any]()
        text = json.dumps(work, sort_keys=True)
        self._head = json.dumps({"work": hashlib.sha256(text.encode()).hexdigest()})
        lines = self._read()
        if lines[:1] != [self._head]:
            file.write_text(f"{self._head}\n", "utf-8")
            return
        for line in lines[1:]:
            try:
                key, value = json.loads(line)
            except ValueError:  # the last one, where it was killed in writing it
                break
            self._known[json.dumps(key)] = value

    @property
    def count(self) -> int:
        """Results that are there."""
        return len(self._known)

    def ask(self, key: Any, find: Callable[[], Any]) -> Any:
        """The result of a key; found out where it isn't there, and kept."""
        name = json.dumps(key)
        if name not in self._known:
            self._known[name] = value = find()
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps([key, value]) + "\n")
        return self._known[name]

    def remove(self) -> None:
        """Once the work is done."""
        self.file.unlink(missing_ok=True)

    def _read(self) -> list[str]:
        try:
            if self.file.stat().st_size > _LARGEST:
                return []
            return self.file.read_text("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return []
