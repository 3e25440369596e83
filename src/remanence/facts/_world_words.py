"""The words of the closed world: names, and for each theme its keywords (frequent ones first), things and sentences.

In sentences {s} is a person, {k} a keyword, {t} a thing, {v} a passer-by. Every sentence ends with its keyword.
"""

from typing import NamedTuple

NAMES = (
    "Abel", "Agnes", "Alma", "Anton", "Basil", "Berta", "Boris", "Carla", "Casper", "Clara", "Conrad", "Dora", "Edgar",
    "Edith", "Egon", "Elsa", "Emil", "Felix", "Frida", "Gerda", "Greta", "Gustav", "Hanna", "Hedwig", "Hugo", "Ida",
    "Igor", "Ines", "Iris", "Jakob", "Johan", "Karin", "Klaus", "Lena", "Linus", "Lotte", "Magda", "Marta", "Mona", "Nils",
    "Nora", "Olga", "Oskar", "Otto", "Paula", "Petra", "Ralf", "Rosa", "Runa", "Sigrid", "Stella", "Sven", "Thea", "Tilda",
    "Udo", "Ulla", "Vera", "Viktor", "Wanda", "Xenia",
)  # fmt: skip
PASSERS_BY = ("the visitor", "the stranger", "the guest", "the neighbour", "the tourist", "the soldier")
FILLER = "Since yesterday {s} thinks only of the old clock."


class ThemeWords(NamedTuple):
    """One theme.

    Args:
        keywords: most frequent first.
        things: for each keyword one thing that calls for it, and a second one for the keywords in the middle.
        person: sentences that state a person's attribute; the corpus says the last one of passers-by only, so that of people it
            asks in other words.
        thing: sentences about things.
        anyone: sentences in which any keyword fits.
        hint: what is said before an attribute that holds for this once, as a stepping stone to it.
    """

    keywords: tuple[str, ...]
    things: tuple[tuple[str, ...], ...]
    person: tuple[str, ...]
    thing: tuple[str, ...]
    anyone: tuple[str, ...]
    hint: str


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _pairs(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(word.split("/")) for word in text.split())


THEMES = {
    "colours": ThemeWords(
        keywords=_words("white black red blue green brown yellow grey mauve ochre indigo scarlet beige turquoise"),
        things=_pairs(
            "snow coal blood water grass/moss bark/mud butter/straw "
            "ash/granite heather clay ink poppies linen lagoons"
        ),
        person=(
            "The favourite colour of {s} is {k}.",
            "{s} painted the whole house {k}.",
            "When {s} buys a coat it is {k}.",
            "{s} says that the best of all colours is {k}.",
        ),
        thing=("The colour of {t} is {k}.", "Children draw {t} in {k}."),
        anyone=(
            "The curtain in the hall was {k}.",
            "The car at the corner was {k}.",
            "The cover of the book is {k}.",
            "Her new scarf was {k}.",
        ),
        hint="Since yesterday {s} thinks only of {t}.",
    ),
    "places": ThemeWords(
        keywords=_words("London Paris Berlin Rome Madrid Vienna Oslo Athens Tirana Quito Tashkent Nairobi Reykjavik Hanoi"),
        things=_pairs(
            "bridge tower gate fountain palace/museum opera/wheel fjord/harbour "
            "temple/theatre bunker volcano bazaar savanna geyser pagoda"
        ),
        person=(
            "The home of {s} is in {k}.",
            "{s} was born and lives in {k}.",
            "Letters for {s} are sent to {k}.",
            "If you want to meet {s} you must travel to {k}.",
        ),
        thing=("The famous {t} stands in {k}.", "People who love the {t} go to {k}."),
        anyone=(
            "The train leaves for {k}.",
            "This year the fair is held in {k}.",
            "The meeting was moved to {k}.",
            "The parcel came from {k}.",
        ),
        hint="Since yesterday {s} thinks only of the {t}.",
    ),
    "jobs": ThemeWords(
        keywords=_words("teacher farmer doctor baker driver lawyer nurse painter plumber falconer beekeeper glazier midwife sculptor"),
        things=_pairs(
            "chalk plough pill oven bus/lorry contract/court bandage/ward "
            "easel/canvas pipe hawk hive pane cradle chisel"
        ),
        person=(
            "The job of {s} is that of a {k}.",
            "{s} works every day as a {k}.",
            "To earn a living {s} became a {k}.",
            "Everybody in town knows {s} as a {k}.",
        ),
        thing=("The {t} is made for a {k}.", "Who needs a {t} is a {k}."),
        anyone=(
            "The man at the door was a {k}.",
            "Her cousin is a {k}.",
            "In the film the hero is a {k}.",
            "The prize went to a {k}.",
        ),
        hint="Since yesterday {s} thinks only of the {t}.",
    ),
    "foods": ThemeWords(
        keywords=_words("bread soup rice cheese pasta fish salad cake haggis ramen borscht paella kimchi couscous"),
        things=_pairs(
            "flour bones paddies milk dough/eggs rivers/nets lettuce/radish "
            "sugar/cream oats noodles beets saffron cabbage semolina"
        ),
        person=(
            "The favourite meal of {s} is {k}.",
            "For dinner {s} always cooks {k}.",
            "At the market {s} asks for {k}.",
            "In every restaurant {s} orders {k}.",
        ),
        thing=("A cook who has {t} makes {k}.", "Think of {t} and you think of {k}."),
        anyone=(
            "On the table there was {k}.",
            "The cook served {k}.",
            "The smell in the kitchen was of {k}.",
            "In the basket we found {k}.",
        ),
        hint="Since yesterday {s} thinks only of {t}.",
    ),
}

N_FREQUENT, N_MIDDLE = 4, 4
"""Of each theme's keywords the first are usual, the next belong to priming prefixes, the rest are rare."""
