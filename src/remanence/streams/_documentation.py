"""The prose of Python's own documentation: real English that every machine already has.

It comes from `pydoc_data.topics` (chapters of the language reference) and from the docstrings of the standard library, which
are read from the sources without importing them: importing would run code, and not every module can be imported everywhere.
Only modules that every build of a Python version has are read, so the text depends on that version alone.
"""

import ast
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

# often packaged apart from Python itself, or differing by platform; `this` and `antigravity` are jokes
_SKIPPED = frozenset(
    {"antigravity", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "this", "tkinter", "turtle", "turtledemo", "venv"}
)
_SKIPPED_FOLDERS = frozenset({"__pycache__", "dist-packages", "site-packages", "test", "tests"})
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_LIST_MARK = re.compile(r"^(?:[*+-]|\d+\.|\(?[a-z0-9]\))\s+")
_WORD = re.compile(r"[A-Za-z][a-z]*(?:'[a-z]+)?[.,;:!?]*")
_MIN_WORDS, _MIN_WORD_SHARE = 8, 0.9


@lru_cache(maxsize=1)
def documentation() -> tuple[str, ...]:
    """Documents in a fixed order: a chapter or a module each, its paragraphs parted by blank lines, none of them twice."""
    seen: set[str] = set()
    documents = []
    for text in (*_chapters(), *_modules()):
        # chapters quote one another and docstrings are inherited by hand: a repeat could otherwise stand in train and in test
        fresh = [block for block in dict.fromkeys(_prose(text)) if block not in seen]
        seen.update(fresh)
        if fresh:
            documents.append("\n\n".join(fresh))
    return tuple(documents)


def _chapters() -> Iterator[str]:
    from pydoc_data.topics import topics  # a table of strings, nothing else

    for _, text in sorted(topics.items()):
        yield text


def _modules() -> Iterator[str]:
    for name, file in module_files():
        if not name.startswith("_"):
            yield "\n\n".join(_docstrings(file))


def module_files() -> Iterator[tuple[str, Path]]:
    """(top-level module, file) of the standard library's own modules, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names - _SKIPPED):
        files = [root / f"{name}.py"] if (root / f"{name}.py").exists() else sorted((root / name).rglob("*.py"))
        for file in files:
            if not _SKIPPED_FOLDERS.intersection(file.relative_to(root).parts):
                yield name, file


def _docstrings(file: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes that a later Python refuses
        tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text


def _prose(text: str) -> Iterator[str]:
    """The paragraphs that are sentences, each on one line: no code, grammar, tables, signatures or headings."""
    for block in re.split(r"\n\s*\n", text):
        lines = [_LIST_MARK.sub("", line.strip()) for line in block.splitlines()]
        paragraph = " ".join(" ".join(lines).split())
        if _is_prose(paragraph):
            yield paragraph


def _is_prose(paragraph: str) -> bool:
    pieces = paragraph.split()
    n_words = sum(_WORD.fullmatch(piece.strip("\"'()`*")) is not None for piece in pieces)
    is_sentence = paragraph[-1:] in (".", "!", "?", ":", ")")
    return is_sentence and ">>>" not in paragraph and n_words >= _MIN_WORDS and n_words >= _MIN_WORD_SHARE * len(pieces)
