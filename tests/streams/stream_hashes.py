"""Hashes of the ids of the digits streams; `python tests/streams/stream_hashes.py` prints them for golden_ids.json."""

import hashlib
import json

from remanence.streams import alone, digits, domains, episodes, joint, learn_then_forget, online, part, permuted, split_classes, turned
from remanence.task import Stream

COMMAND = "python tests/streams/stream_hashes.py > tests/streams/golden_ids.json"


def stream_hash(stream: Stream) -> str:
    """Hex sha256 over verb, name and ids of every event and bystander, in order."""
    digest = hashlib.sha256()
    for verb, task in [*((event.verb, event.task) for event in stream), *(("", task) for task in stream.bystanders)]:
        digest.update(f"{verb} {task.name}".encode())
        for table in (task.train, task.valid, task.test):
            digest.update(b"-" if table is None else table.ids.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def hashes() -> dict[str, str]:
    source = digits()
    split = split_classes(part(source, "stream"), 2, 0, valid_share=0.1, bystanders=[turned(part(source, "pretrain"))])
    streams = {
        "split_classes": split,
        "domains": domains(source, (0, 45, 90), order_seed=1),
        "permuted": permuted(source, 3),
        "joint": joint(split),
        "online": online(split, 32, blur=0.5),
        "alone": alone(split),
        "learn_then_forget": learn_then_forget(split, [2, 0]),
        "episodes": episodes(source, n=5, shots_range=(1, 4)),
    }
    return {"command": COMMAND, **{name: stream_hash(stream) for name, stream in streams.items()}}


if __name__ == "__main__":
    print(json.dumps(hashes(), indent=2))
