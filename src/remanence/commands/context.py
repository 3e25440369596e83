"""`remanence context`: models that read documents of any length, a byte at a time, and carry a state of bounded size.

    remanence context train --out reader
    remanence context stream reader notes.txt --state notes.safetensors

Text is read as bytes: no tokenizer has to be trained, and any file will do.
"""

import argparse
from pathlib import Path
from typing import Any

from remanence.commands._context_models import KINDS

_ABOUT = """\
example:
  remanence context train --out reader --steps 1000
  remanence context perplexity reader book.txt
  remanence context bytes reader
  remanence context stream reader book.txt --state book.safetensors
"""

_TRAIN = """\
Trains a model on the text files of a folder, or on the sources of Python's standard library, with truncated backpropagation through
windows; products are in bfloat16. Some documents are held out; at the end their bits per byte are printed. DIR then holds config.json,
model.safetensors and training.json. The same command resumes a training that was interrupted.

example:
  remanence context train --out reader
  remanence context train ~/books --out xl --model transformer-xl --set cache=128 --steps 3000
"""

_PERPLEXITY = """\
Prints bits and perplexity per byte by position in the document; a memory that helps shows as fewer bits further in. Every file is a
document, read from its beginning.

example:
  remanence context perplexity reader book.txt other.txt
"""

_BYTES = """\
Prints what one document's memory takes, part by part, beside a full key-value cache of the same body. "stored" is what lies in
memory; "kv" counts a key and a value for every long-term token, as papers do. The first document costs as much as the last.

example:
  remanence context bytes reader
  remanence context bytes --model melodi --set hidden_size=1024 --set num_hidden_layers=13 --set window=512
"""

_STREAM = """\
Reads a file of any length, or standard input, in constant memory, and prints the running bits per byte, the speed and the memory of the
process. With --state what was read is remembered: the next call goes on behind it. Given a file whose beginning it read last, it
goes on behind that; any other file follows as the document's next part.

example:
  remanence context stream reader book.txt --state book.safetensors
  journalctl -f | remanence context stream reader - --state journal.safetensors
"""


def add(commands: Any, shape: Any) -> None:
    """Declare the command and its sub-commands."""
    parser = commands.add_parser("context", help="models that read long documents", description=_ABOUT, formatter_class=shape)
    parts = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(parts.add_parser("train", help="train one; resumes", description=_TRAIN, formatter_class=shape))
    _add_perplexity(parts.add_parser("perplexity", help="bits per byte by position", description=_PERPLEXITY, formatter_class=shape))
    _add_bytes(parts.add_parser("bytes", help="what its memory takes", description=_BYTES, formatter_class=shape))
    _add_stream(parts.add_parser("stream", help="read a file of any length", description=_STREAM, formatter_class=shape))


def _add_train(parser: argparse.ArgumentParser) -> None:
    corpus = "folder of .txt files, a document each (default: the sources of Python's standard library)"
    parser.add_argument("corpus", nargs="?", type=Path, metavar="CORPUS", help=corpus)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model, and its checkpoint until it is done")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="segments of each of 8 rows to read (default: 1000)")
    parser.add_argument("--lr", type=float, metavar="RATE", help="peak rate (default: 8e-3, or 1e-3 for more than 256 numbers of width)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights and the order of documents (default: 0)")
    _add_kind(parser)
    parser.set_defaults(command=_train)


def _add_perplexity(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="documents")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.set_defaults(command=_perplexity)


def _add_bytes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, metavar="MODEL", help="a trained model; without it, --model and --set are counted")
    _add_kind(parser)
    parser.set_defaults(command=_bytes)


def _add_stream(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("file", type=Path, metavar="FILE", help="what to read; - is standard input")
    parser.add_argument("--state", type=Path, metavar="FILE", help="where to remember what was read (.safetensors); goes on from it")
    parser.add_argument("--segment", type=int, metavar="N", help="bytes of a call (default: as many windows as fit into 1024)")
    parser.set_defaults(command=_stream)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="MODEL", help="folder of a model that `remanence context train` wrote")


def _add_kind(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=KINDS, default="melodi", help="kind of model (default: melodi)")
    setting = "a setting of its configuration, hidden_size=256 for instance; an unknown one lists all"
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=setting)


def _train(arguments: argparse.Namespace) -> int:
    from remanence.commands._context_train import train

    return train(arguments)


def _perplexity(arguments: argparse.Namespace) -> int:
    from remanence.commands._context_perplexity import perplexity

    return perplexity(arguments)


def _bytes(arguments: argparse.Namespace) -> int:
    from remanence.commands._context_bytes import memory_bytes

    return memory_bytes(arguments)


def _stream(arguments: argparse.Namespace) -> int:
    from remanence.commands._context_stream import stream

    return stream(arguments)
