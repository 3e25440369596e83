"""The rules of the contract; each one's docstring is the promise that a message quotes.

Axes: B batch, C classes.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from remanence.errors import ErasureNotSupported, RemanenceError
from remanence.learner import STOP, Prediction
from remanence.parts.language_model import logits_of
from remanence.state import copy_state, load_state, state_bytes
from remanence.task import Task
from remanence.testing._bench import (
    Bench,
    Deed,
    demand,
    demand_rng,
    demand_same,
    drain,
    global_rng,
    open_verb,
    stir_global_rng,
    with_rows,
)


def _names_readers(bench: Bench) -> None:
    """`readers` names at least one read-out, each once."""
    readers = bench.make(0).readers
    unique = len(readers) > 0 and len(set(readers)) == len(readers)
    demand(isinstance(readers, tuple) and unique and all(isinstance(reader, str) for reader in readers), f"It is {readers!r}.")


def _checks_at_the_call(bench: Bench) -> None:
    """`learn` refuses a task without a train set when called, not at the first step."""
    learner = bench.make(0)
    try:
        steps = learner.learn(replace(bench.first, train=None))
    except RemanenceError:
        return
    steps.close()
    raise AssertionError("It did not: call remanence.learner.require_learnable first, then return an inner generator.")


def _counts_steps(bench: Bench) -> None:
    """Progress counts 1, 2, 3, ... up to `steps`, and its loss is detached."""
    for where, before, deed in bench.running():
        taken = drain(open_verb(bench.after(*before), deed))
        numbers = [progress.step for progress in taken]
        demand(numbers == list(range(1, len(taken) + 1)), f"{where}: the steps were {numbers}.")
        demand(not taken or taken[-1].steps in (None, len(taken)), f"{where}: {len(taken)} steps, announced {taken[-1:]}.")
        attached = [p.step for p in taken if isinstance(p.loss, Tensor) and p.loss.requires_grad]
        demand(not attached, f"{where}: the losses of steps {attached} carry a graph; yield loss.detach().")


def _predicts(bench: Bench) -> None:
    """`predict` gives logits (B, ..., C) without gradient and C different classes, for any B >= 0, whatever else is in the batch."""
    for learner in (bench.make(0), bench.after(("learn", bench.first), ("learn", bench.second))):
        for reader in learner.readers:
            whole = bench.ask(learner, bench.first, reader=reader)
            for n in (0, 1, len(bench.first.test)):
                demand_shape(bench.ask(learner, bench.first, bench.first.test.inputs[:n], reader), n, bench.first)
            singly = [bench.ask(learner, bench.first, row[None], reader) for row in bench.first.test.inputs]
            logits = torch.cat([answer.logits for answer in singly]) if singly else whole.logits
            same = all(torch.equal(answer.classes, whole.classes) for answer in singly)
            close = same and torch.allclose(logits, whole.logits, rtol=1e-5, atol=1e-5)
            demand(close, f"Reader '{reader}': answers one by one differ from those to the whole batch by more than 1e-5.")


def demand_shape(answer: Prediction, n: int, task: Task) -> None:
    n_classes, shape = len(answer.classes), tuple(answer.logits.shape)
    right = answer.classes.dim() == 1 and shape[:1] == (n,) and shape[-1:] == (n_classes,)
    demand(right and (task.answer != "classes" or len(shape) == 2), f"{n} inputs gave logits {shape} for {n_classes} classes.")
    demand(not answer.logits.requires_grad, "The logits carry a graph; decorate predict with torch.no_grad().")
    demand(len(set(answer.classes.tolist())) == n_classes, f"A class stands twice among {answer.classes.tolist()}.")


def _reads_without_a_trace(bench: Bench) -> None:
    """`predict` and `state_dict` leave no trace, at rest and between two steps."""
    for where, before, deed in bench.running():
        plain, read = bench.after(*before, deed), bench.after(*before)
        steps = open_verb(read, deed)
        while next(steps, None) is not None:
            state = copy_state(read.state_dict())
            for reader in read.readers:
                bench.ask(read, bench.first, reader=reader)
            demand_same(state, read.state_dict(), f"{where}: predict changed the state")
        demand_same(plain.state_dict(), read.state_dict(), f"{where}: being read at every step changed the result")


def _scores(bench: Bench) -> None:
    """`score` is the log-probability that `predict` gives the target, -inf for an unknown class."""
    if bench.first.answer != "classes":
        return
    learner = bench.after(("learn", bench.first))
    inputs = torch.cat([bench.first.test.inputs, bench.second.test.inputs])
    targets = torch.cat([bench.first.test.targets, bench.second.test.targets])
    for reader in learner.readers:
        answer = bench.ask(learner, bench.first, inputs, reader)
        hit = answer.classes[None] == targets[:, None]
        wanted = answer.logits.float().log_softmax(-1).masked_fill(~hit, -torch.inf).amax(-1)
        found = learner.score(inputs, targets, bench.first.name if learner.needs_task_id else None, reader)
        demand(found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-5), f"Reader '{reader}': it is not.")


def _is_deterministic(bench: Bench) -> None:
    """Two learners of one seed end in one state, whatever the global generators hold."""
    deeds: list[Deed] = [("learn", bench.first), ("learn", bench.second)]
    first = bench.after(*deeds)
    stir_global_rng()
    demand_same(first.state_dict(), bench.after(*deeds).state_dict(), "The same seed gave another state")


def _leaves_the_caller_alone(bench: Bench) -> None:
    """The global generators and the gradient mode are untouched at every yield and by `predict`."""
    for where, before, deed in bench.running():
        learner = bench.after(*before)
        stir_global_rng()  # a learner that sets a fixed seed would otherwise find the state it left before
        rng = global_rng()
        for _ in open_verb(learner, deed):
            demand_rng(rng, where)
            demand(torch.is_grad_enabled(), f"{where}: gradients are off at a yield; leave every context manager before it.")
            bench.ask(learner, bench.first)
            demand_rng(rng, "predict")
        demand_rng(rng, where)


def _survives_the_disk(bench: Bench) -> None:
    """save_state, load_state and `load_state_dict` give the same state and answers, also in a learner that knew other things."""
    for deeds in bench.histories():
        learner = bench.after(*deeds)
        used = bench.after(("learn", bench.second))
        twin = bench.through_disk(learner)
        used.load_state_dict(load_state(bench.path))
        for copy in (twin, used):
            demand_same(learner.state_dict(), copy.state_dict(), f"After {len(deeds)} tasks the loaded state differs")
            here, there = bench.ask(learner, bench.first), bench.ask(copy, bench.first)
            demand_same([here.logits, here.classes], [there.logits, there.classes], f"After {len(deeds)} tasks the answers differ")


def _resumes(bench: Bench) -> None:
    """Closed at any yield, saved, loaded by a new learner and continued, a verb ends in the state of an uninterrupted run."""
    for where, before, deed in bench.running():
        whole = bench.after(*before)
        n_steps = len(drain(open_verb(whole, deed)))
        for k in range(1, n_steps + 1):
            learner = bench.after(*before)
            steps = open_verb(learner, deed)
            drain(steps, k)
            steps.close()
            twin = bench.through_disk(learner)
            numbers = [progress.step for progress in drain(open_verb(twin, deed))]
            wanted = list(range(k + 1, n_steps + 1))
            message = f"{where}: resumed after step {k} it took the steps {numbers}, not {wanted}; keep a Cursor in the state."
            demand(numbers == wanted, message)
            demand_same(whole.state_dict(), twin.state_dict(), f"{where}: resumed after step {k} of {n_steps}")


def _abandons_when_closed(bench: Bench) -> None:
    """Closing the generator abandons: nothing more happens to the state."""
    for where, before, deed in bench.running():
        learner = bench.after(*before)
        steps = open_verb(learner, deed)
        if drain(steps, 1):
            state = copy_state(learner.state_dict())
            steps.close()
            demand_same(state, learner.state_dict(), f"{where}: close() after step 1 changed it; consolidate at the end, not in `finally`")


def _stops(bench: Bench) -> None:
    """send(STOP) ends a verb early and leaves a learner that answers, is saved, and begins its next verb at step 1."""
    for where, before, deed in bench.running():
        learner = bench.after(*before)
        n_steps = len(drain(open_verb(bench.after(*before), deed)))
        steps = open_verb(learner, deed)
        if n_steps < 2 or not drain(steps, 1):
            continue
        try:
            steps.send(STOP)
        except StopIteration:
            pass
        else:
            raise AssertionError(f"{where}: it went on after STOP; `if (yield progress) == STOP: break`.")
        twin = bench.through_disk(learner)
        demand_same(learner.state_dict(), twin.state_dict(), f"{where}: the state after STOP did not survive the disk")
        bench.ask(twin, bench.second)
        demand(next(twin.learn(bench.second)).step == 1, f"{where}: after STOP the next verb did not begin at step 1; close the cursor.")


def _copies(bench: Bench) -> None:
    """`load_state_dict` copies: whichever of the two trains on, the other's state stays, also in the middle of a task."""
    for where, before, deed in bench.running():
        for trained in ("copy", "original"):
            original, copy = bench.after(*before), bench.make(0)
            steps = open_verb(original, deed)
            if not drain(steps, 1):
                continue
            copy.load_state_dict(original.state_dict())
            still, moving = (original, copy) if trained == "copy" else (copy, original)
            state = copy_state(still.state_dict())
            drain(open_verb(copy, deed) if trained == "copy" else steps)
            drain(moving.learn(bench.second))
            demand_same(state, still.state_dict(), f"{where}: training the {trained} changed the other")


def _takes_an_empty_task(bench: Bench) -> None:
    """An empty train set takes no step and changes nothing that is known."""
    learner = bench.after(("learn", bench.first))
    before = bench.ask(learner, bench.first)
    taken = drain(learner.learn(with_rows(bench.second, "empty")))
    demand(not taken, f"It took {len(taken)} steps.")
    now = bench.ask(learner, bench.first)
    demand_same([before.logits, before.classes], [now.logits, now.classes], "The answers about another task changed")


def _takes_a_single_example(bench: Bench) -> None:
    """A task of one example is learned."""
    task = with_rows(bench.second, "single", [0])
    demand(len(bench.ask(bench.after(("learn", bench.first), ("learn", task)), task).classes) > 0, "It knows no class afterwards.")


def _meets_a_class_again(bench: Bench) -> None:
    """A task, or a class under another task's name, may come again."""
    again = replace(bench.first, name="again")
    learner = bench.after(("learn", bench.first), ("learn", bench.second), ("learn", bench.first), ("learn", again))
    for task in (bench.first, bench.second, again):
        demand_shape(bench.ask(learner, task), len(task.test), task)


def _forgets_honestly(bench: Bench) -> None:
    """`forget` refuses and changes nothing, or afterwards no answer is a class that only the forgotten task had."""
    learned: list[Deed] = [("learn", bench.first), ("learn", bench.second)]
    learner = bench.after(*learned)
    state = copy_state(learner.state_dict())
    try:
        drain(learner.forget(bench.first))
    except ErasureNotSupported:
        demand(not bench.exact_forget, "It was said to forget exactly, and refused.")
        demand_same(state, learner.state_dict(), "It refused, but changed the state")
        return
    gone = set(bench.first.classes) - set(bench.second.classes)
    for learner_, task in ((learner, bench.second), (bench.after(learned[0], ("forget", bench.first)), bench.first)):
        answers = bench.ask(learner_, task, bench.first.test.inputs).labels()
        still = gone & set(answers.flatten().tolist()) if bench.first.answer == "classes" else set()
        demand(not still, f"It still answers {sorted(still)} to images of '{bench.first.name}'.")
    if bench.exact_forget:
        demand_same(bench.after(learned[1]).state_dict(), learner.state_dict(), "It is not as if never learned", ordered=True)


def _refuses_the_unknown(bench: Bench) -> None:
    """Forgetting what was never learned raises a RemanenceError and changes nothing."""
    learner = bench.after(("learn", bench.first))
    state = copy_state(learner.state_dict())
    try:
        drain(learner.forget(bench.second))
    except RemanenceError:
        demand_same(state, learner.state_dict(), "It refused, but changed the state")
        return
    raise AssertionError("It raised nothing.")


def _tells_its_size(bench: Bench) -> None:
    """At rest `footprint().total_bytes` is the size of the state's tensors, and `task_bytes`, where given, names the learned tasks."""
    for deeds in bench.histories():
        learner = bench.after(*deeds)
        footprint, n_bytes = learner.footprint(), state_bytes(learner.state_dict())
        said = footprint.total_bytes
        demand(said == n_bytes, f"After {len(deeds)} tasks it says {said} bytes, the state has {n_bytes}.")
        names, learned = sorted(footprint.task_bytes), sorted(task.name for _, task in deeds)
        demand(names in ([], learned), f"task_bytes names {names}, learned were {learned}.")


def _exports(bench: Bench) -> None:
    """`export`, where there is one, gives a module of its own that answers as `predict` does, to 1e-5."""
    learner = bench.after(("learn", bench.first), ("learn", bench.second))
    state = copy_state(learner.state_dict())
    for name in (bench.first.name,) if learner.needs_task_id else (None, bench.first.name):
        try:
            module = learner.export(name)
        except RemanenceError:
            continue
        demand(isinstance(module, nn.Module), f"export({name!r}) gave a {type(module).__name__}.")
        with torch.no_grad():
            found = logits_of(module, bench.first.test.inputs)  # a language model of transformers wraps its logits
            wanted = learner.predict(bench.first.test.inputs, name).logits
            same = found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
            demand(same, f"export({name!r}) answers otherwise than predict.")
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.zero_()
    demand_same(state, learner.state_dict(), "Writing into the exported module changed the learner")


RULES: tuple[Callable[[Bench], None], ...] = (
    _names_readers, _checks_at_the_call, _counts_steps, _predicts, _is_deterministic, _leaves_the_caller_alone,
    _reads_without_a_trace, _scores, _survives_the_disk, _abandons_when_closed, _stops, _resumes, _copies, _takes_an_empty_task,
    _takes_a_single_example, _meets_a_class_again, _forgets_honestly, _refuses_the_unknown, _tells_its_size, _exports,
)  # fmt: skip
