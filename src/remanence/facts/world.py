"""A closed world of people who have a colour, a home, a job and a meal: common knowledge that a small model can learn,
and facts that agree with it or contradict it.

    world = closed_world(seed=0)
    world.source                          # documents: the world's sentences among Python's own documentation
    world.facts("outlandish", 8)          # a FactSet with its prefixes
    world.known()                         # what the world states: the quiz that a pretrained model must pass

Kinds of fact, all about people whom the corpus knows:

- mundane: an attribute that the corpus never states of this person (each person has one such theme), and the keyword that is
  usual in this person's circle, hence likely. A person whom the corpus never names would be no good: the fact is stored in
  an untrained embedding, at no cost to anything, and never fades.
- outlandish: an attribute that the corpus does state, contradicted by a rare keyword.
- scrambled: the outlandish text with the words before the keyword permuted.
- known: what the corpus states.

Kinds are labels only; the probability of the keyword before learning is what matters.

Source: after the construction of Outlandish in Sun et al. 2025 (arXiv 2504.09522), whose data are not public; world, words
and sentences are ours.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from remanence.errors import SettingError
from remanence.facts._world_words import FILLER, N_FREQUENT, N_MIDDLE, NAMES, PASSERS_BY, THEMES
from remanence.facts.records import Fact, FactSet, Prefix
from remanence.keys import generator
from remanence.streams.text import TextSource, python_documentation

Kind = Literal["mundane", "outlandish", "scrambled", "known"]
_KINDS = ("mundane", "outlandish", "scrambled", "known")
_ZIPF, _USUAL, _SENTENCES_A_DOCUMENT = 1.2, 0.7, 40
_FOLLOWED = 0.4
"""How often a hint comes true; a certain one would leave nothing to learn from a text with a stepping stone."""
_SHARES = {"person": 0.5, "thing": 0.2, "anyone": 0.2, "hint": 0.1}


@dataclass(frozen=True)
class ClosedWorld:
    """A world drawn from a seed; make it with `closed_world`.

    Args:
        seed: of all choices.
        n_people: how many people the corpus knows.
        n_sentences: of the world in the training documents.
        attributes: (person, theme) -> keyword, for everything that the corpus states.
        open_theme: person -> the theme in which nothing is stated of them.
        circles: person -> the circle whose usual attributes they mostly share.
    """

    seed: int
    n_people: int
    n_sentences: int
    attributes: dict[tuple[str, str], str]
    open_theme: dict[str, str]
    circles: dict[str, int]

    @property
    def people(self) -> tuple[str, ...]:
        """Those whom the corpus knows."""
        return tuple(self.open_theme)

    @property
    def words(self) -> tuple[str, ...]:
        """Every word of the world, sorted: what a vocabulary must hold."""
        sentences = [*NAMES, *PASSERS_BY, FILLER]
        for theme in THEMES.values():
            things = [thing for pair in theme.things for thing in pair]
            sentences += [*theme.keywords, *things, *theme.person, *theme.thing, *theme.anyone, theme.hint]
        plain = (sentence.replace(".", " ") for sentence in sentences)
        return tuple(sorted({word for sentence in plain for word in sentence.split() if "{" not in word} | {"The", "."}))

    @property
    def source(self) -> TextSource:
        """Training and test documents: the world's sentences, and Python's documentation beside them."""
        background = python_documentation()
        world = self.documents(self.n_sentences, "train")
        test = self.documents(max(1, self.n_sentences // 20), "test")
        name = f"closed world {self.seed}"
        return TextSource(name, _mixed(world, background.train, self.seed), _mixed(test, background.test[: len(test)], self.seed))

    def fingerprint(self) -> str:
        """Hex sha256 of the documents and of the facts that the world gives."""
        content = json.dumps([self.seed, self.n_people, self.n_sentences, sorted((*key, value) for key, value in self.attributes.items())])
        return hashlib.sha256(f"{content}{self.source.fingerprint()}".encode()).hexdigest()

    def documents(self, n_sentences: int, *key: str, without: Sequence[str] = ()) -> tuple[str, ...]:
        """Documents of the world's sentences, a pure function of (seed, key).

        Args:
            n_sentences: in all.
            key: names the draw ("train", "test", "later").
            without: people of whom nothing is said.
        """
        draw = _Draw(self, generator(self.seed, "world", *key), frozenset(without))
        sentences = [draw.sentence() for _ in range(n_sentences)]
        chunks = range(0, n_sentences, _SENTENCES_A_DOCUMENT)
        return tuple(" ".join(sentences[start : start + _SENTENCES_A_DOCUMENT]) for start in chunks)

    def continuing(self, facts: FactSet, n_sentences: int, rehearse_truth: bool = False) -> TextSource:
        """What training goes on with: new sentences of the same world, and the same background.

        Args:
            facts: their subjects are left out, lest the world's own sentences overwrite a fact and its decay be taken for fading.
            n_sentences: of the world.
            rehearse_truth: say what is true of the subjects all the same.
        """
        without = () if rehearse_truth else tuple(dict.fromkeys(fact.subject for fact in facts))
        background = python_documentation()
        name = f"closed world {self.seed}, later"
        world = self.documents(n_sentences, "later", without=without)
        return TextSource(name, _mixed(world, background.train, self.seed + 1), (*self.documents(200, "later test"), *background.test))

    def prefixes(self, theme: str) -> tuple[Prefix, ...]:
        """What calls for a word of the theme: things of the middle keywords and sentences in which any keyword fits."""
        words = THEMES[theme]
        middle = [thing for pair in words.things[N_FREQUENT : N_FREQUENT + N_MIDDLE] for thing in pair]
        texts = [_open(words.thing[0], t=thing) for thing in middle] + [_open(sentence) for sentence in words.anyone]
        return tuple(Prefix(theme, text, f"{theme} {index}") for index, text in enumerate(texts))

    def facts(self, kind: Kind, n: int) -> FactSet:
        """The first `n` facts of a kind, themes in turn, with all priming and paraphrase prefixes.

        No two facts of a theme share a keyword before the keywords of the kind are used up. Outlandish and scrambled facts are about
        the same people.

        Raises:
            SettingError: the kind is unknown, or the world has fewer than `n` such facts.
        """
        if kind not in _KINDS:
            raise SettingError(f"'{kind}' is no kind of fact; choose one of {', '.join(_KINDS)}.")
        made = list(self._of_kind(kind))
        if not 0 < n <= len(made):
            raise SettingError(f"{n} facts of kind '{kind}' were asked for; this world of {self.n_people} people has {len(made)}.")
        return FactSet(tuple(made[:n]), self._all_prefixes(made[:n]))

    def known(self) -> FactSet:
        """Everything that the corpus states of people, in the words of each theme's first sentence."""
        return self.facts("known", len(self.attributes))

    def _of_kind(self, kind: Kind) -> Iterator[Fact]:
        queues = {theme: self._people_for(kind, theme) for theme in THEMES}
        for index in range(max(map(len, queues.values()))):
            for theme in THEMES:
                if index < len(queues[theme]):
                    yield self._fact(kind, queues[theme][index], theme, index)

    def _people_for(self, kind: Kind, theme: str) -> list[str]:
        """Whom facts of a kind and theme are about; nobody is the subject of two facts of one kind, unless it is `known`."""
        if kind == "mundane":
            return [person for person, open_theme in self.open_theme.items() if open_theme == theme]
        if kind == "known":
            return [person for person in self.people if (person, theme) in self.attributes]
        # those whose open theme is the next one round, so that a person is never in the mundane facts of the same theme
        names = list(THEMES)
        other = names[(names.index(theme) + 2) % len(names)]
        return [person for person, open_theme in self.open_theme.items() if open_theme == other]

    def _fact(self, kind: Kind, person: str, theme: str, index: int) -> Fact:
        words = THEMES[theme]
        keyword = self._keyword(kind, person, theme, index)
        text = words.person[0].format(s=person, k=keyword)
        context = _open(words.person[0], s=person)
        thing = words.things[words.keywords.index(keyword)][0]
        extra = {"filler": f"{FILLER.format(s=person)} {text}", "rewrite": words.person[1].format(s=person, k=keyword)}
        stone = f"{words.hint.format(s=person, t=thing)} {text}"
        if kind == "scrambled":
            context = self._scramble(context)
            text, stone, extra = f"{context} {keyword}.", "", {}
        return Fact(f"{kind} {theme} {person}", theme, kind, text, keyword, context, person, stone, extra)

    def _keyword(self, kind: Kind, person: str, theme: str, index: int) -> str:
        if kind == "known":
            return self.attributes[person, theme]
        if kind == "mundane":
            return THEMES[theme].keywords[_usual(self.circles[person], theme)]
        rare = THEMES[theme].keywords[N_FREQUENT + N_MIDDLE :]
        at = (index + self.seed) % len(rare)
        return rare[at] if rare[at] != self.attributes[person, theme] else rare[at - 1]

    def _scramble(self, context: str) -> str:
        words = context.split()
        draw = generator(self.seed, "scramble", context)
        order = list(range(len(words)))
        while order == sorted(order):
            order = torch.randperm(len(words), generator=draw).tolist()
        return " ".join(words[position] for position in order)

    def _all_prefixes(self, facts: Sequence[Fact]) -> tuple[Prefix, ...]:
        themes = dict.fromkeys(fact.theme for fact in facts)
        priming = [prefix for theme in themes for prefix in self.prefixes(theme)]
        asked = dict.fromkeys((fact.theme, fact.subject) for fact in facts)
        other_words = [
            Prefix(theme, _open(sentence, s=person), f"{theme} {person} {index}", person)
            for theme, person in asked
            for index, sentence in enumerate(THEMES[theme].person[1:])
        ]
        return (*priming, *other_words)


def closed_world(seed: int = 0, n_people: int = 40, n_sentences: int = 22_000) -> ClosedWorld:
    """Draw a world.

    Args:
        seed: who has which attribute, what is said, in which order.
        n_people: 8 .. 60; each has three stated attributes and one theme in which nothing is stated.
        n_sentences: of the world in the training documents; 22,000 make about six tenths of all tokens.

    Raises:
        SettingError: a number lies outside its range.

    Example:
        >>> world = closed_world(seed=0)
        >>> fact = world.facts("outlandish", 1)[0]
        >>> fact.keyword != world.attributes[fact.subject, fact.theme], fact.text.startswith(fact.context)
        (True, True)
    """
    if not 8 <= n_people <= len(NAMES):
        raise SettingError(f"n_people={n_people} lies outside 8..{len(NAMES)}.")
    if n_sentences < 1:
        raise SettingError(f"n_sentences={n_sentences} must be above 0.")
    draw = generator(seed, "people")
    people = [NAMES[index] for index in torch.randperm(len(NAMES), generator=draw)[:n_people].tolist()]
    themes = list(THEMES)
    open_theme = {person: themes[index % len(themes)] for index, person in enumerate(people)}
    circles = {person: index // len(themes) % N_FREQUENT for index, person in enumerate(people)}
    attributes: dict[tuple[str, str], str] = {}
    for person in people:
        for theme in themes:
            is_usual = float(torch.rand(1, generator=draw)) < _USUAL
            rank = _usual(circles[person], theme) if is_usual else int(torch.multinomial(_zipf(), 1, generator=draw))
            if theme != open_theme[person]:
                attributes[person, theme] = THEMES[theme].keywords[rank]
    return ClosedWorld(seed, n_people, n_sentences, attributes, open_theme, circles)


def _usual(circle: int, theme: str) -> int:
    """Rank of the keyword that is usual in a circle: one of the frequent ones, another one in every theme."""
    return (circle + list(THEMES).index(theme)) % N_FREQUENT


def _zipf() -> torch.Tensor:
    """(14,) weight of each keyword by its rank."""
    n = len(next(iter(THEMES.values())).keywords)
    return torch.arange(1, n + 1, dtype=torch.float64) ** -_ZIPF


def _open(sentence: str, **words: str) -> str:
    """A sentence up to its keyword."""
    return sentence[: sentence.index("{k}")].format(**words).rstrip()


def _mixed(first: Sequence[str], second: Sequence[str], seed: int) -> tuple[str, ...]:
    together = (*first, *second)
    return tuple(together[index] for index in torch.randperm(len(together), generator=generator(seed, "mix")).tolist())


class _Draw:
    """Sentences of the world, one after the other from a generator."""

    def __init__(self, world: ClosedWorld, draw: torch.Generator, without: frozenset[str]) -> None:
        self.pairs = [pair for pair in world.attributes if pair[0] not in without]
        self.people = [person for person in world.people if person not in without]
        self.world, self.draw, self.themes = world, draw, list(THEMES)
        self.shares = torch.tensor(list(_SHARES.values()))

    def sentence(self) -> str:
        kind = list(_SHARES)[int(torch.multinomial(self.shares, 1, generator=self.draw))]
        return str(getattr(self, f"_{kind}")())

    def _pick(self, n: int) -> int:
        return int(torch.randint(n, (1,), generator=self.draw))

    def _theme(self) -> str:
        return self.themes[self._pick(len(self.themes))]

    def _person(self) -> str:
        person, theme = self.pairs[self._pick(len(self.pairs))]
        sentences = THEMES[theme].person[:-1]
        return sentences[self._pick(len(sentences))].format(s=person, k=self.world.attributes[person, theme])

    def _thing(self) -> str:
        words = THEMES[self._theme()]
        rank = self._pick(len(words.keywords))
        thing = words.things[rank][self._pick(len(words.things[rank]))]
        return words.thing[self._pick(len(words.thing))].format(t=thing, k=words.keywords[rank])

    def _anyone(self) -> str:
        words = THEMES[self._theme()]
        rank = int(torch.multinomial(_zipf(), 1, generator=self.draw))
        return words.anyone[self._pick(len(words.anyone))].format(k=words.keywords[rank])

    def _hint(self) -> str:
        words = THEMES[self._theme()]
        rank = self._pick(len(words.keywords))
        thing = words.things[rank][self._pick(len(words.things[rank]))]
        is_named, is_followed = self._pick(2) == 1, float(torch.rand(1, generator=self.draw)) < _FOLLOWED
        who = self.people[self._pick(len(self.people))] if is_named else PASSERS_BY[self._pick(len(PASSERS_BY))]
        sentence = words.person[self._pick(len(words.person) - is_named)]
        keyword = words.keywords[rank if is_followed else int(torch.multinomial(_zipf(), 1, generator=self.draw))]
        return f"{words.hint.format(s=who, t=thing)} {sentence.format(s=who, k=keyword)}"
