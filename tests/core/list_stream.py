"""A stream that is a list of events, and rows without what may differ from run to run."""

from dataclasses import asdict

from remanence.task import Event, Stream


class ListStream(Stream):
    name = "list"

    def __init__(self, *events, mode="sequential", task_id_at_test=False, bystanders=()):
        self.events = [Event(verb, task) for verb, task in events]
        self.mode, self.task_id_at_test, self.bystanders = mode, task_id_at_test, tuple(bystanders)

    def __len__(self):
        return len(self.events)

    def event(self, index):
        return self.events[index]


def exact_rows(ledger):
    """Every row in order, as a dict; of inexact ones the value is left out."""
    return [{key: value for key, value in asdict(row).items() if row.exact or key != "value"} for row in ledger]
