"""A generated sentiment set for machines without network: its labels follow from how a sentence
is built (negation, contrast, comparison), and not from which words stand in it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import datasets

from kronbert.distill.data import TaskData
from kronbert.distill.tasks import Task
from kronbert.errors import DataError

TASK = Task(
    name="synthetic-sentiment",
    text=("sentence",),
    labels=("negative", "positive"),
    max_length=64,
)
NEGATIVE, POSITIVE = 0, 1

# item | places | rival | what one does again, then aspects. An aspect is `name: praise / blame`; a
# plural ends in '+'. '*' marks words that are already extreme: no "very", no "not at all".
_DOMAINS = """
film | in this film, in the sequel, in this remake | in the original | watch it
acting: convincing, moving, subtle, superb* / wooden, forced, clumsy, dreadful*
plot: gripping, clever, original, ingenious* / thin, predictable, muddled, tedious
dialogue: sharp, witty, natural, sparkling* / stilted, lifeless, awkward, atrocious*
soundtrack: haunting, memorable, fitting, glorious* / bland, intrusive, repetitive, unbearable*
ending: satisfying, surprising, touching, perfect* / rushed, abrupt, disappointing, ridiculous*
special effects+: impressive, believable, inventive, superb* / cheap, dated, distracting, silly
#
restaurant | at this restaurant, at the corner café, at our table | next door | eat there
soup: rich, warming, fragrant, heavenly* / watery, salty, lukewarm, inedible*
bread: fresh, crusty, tasty, wonderful* / stale, dry, rubbery, dreadful*
fish: tender, delicate, juicy, exquisite* / overcooked, tasteless, greasy, revolting*
desserts+: delicious, light, creative, divine* / sickly, heavy, bland, awful*
waiter: friendly, attentive, patient, marvellous* / rude, careless, slow, appalling*
portions+: generous, filling, well balanced, perfect* / small, stingy, disappointing, laughable*
#
hotel | at this hotel, in our wing, in the new annex | in our last hotel | stay there
room: spacious, bright, cosy, spotless* / cramped, gloomy, noisy, filthy*
bed: comfortable, soft, inviting, heavenly* / hard, lumpy, creaky, unbearable*
breakfast: varied, fresh, generous, excellent* / stale, meagre, bland, dreadful*
receptionist: helpful, welcoming, polite, delightful* / rude, unhelpful, cold, appalling*
view: lovely, relaxing, impressive, stunning* / dreary, depressing, disappointing, hideous*
bathroom: clean, modern, practical, immaculate* / dirty, mouldy, outdated, disgusting*
#
phone | on this phone, on the new model, on the cheaper version | on my old phone | buy it
screen: bright, crisp, responsive, gorgeous* / dim, blurry, sluggish, useless*
battery: reliable, durable, dependable, outstanding* / weak, unreliable, disappointing, hopeless*
camera: sharp, quick, versatile, fantastic* / grainy, slow, temperamental, terrible*
software: smooth, intuitive, stable, flawless* / buggy, confusing, bloated, atrocious*
speakers+: clear, powerful, balanced, superb* / tinny, muffled, feeble, awful*
buttons+: sturdy, handy, responsive, perfect* / flimsy, stiff, fiddly, useless*
#
novel | in this novel, in the second volume, in this translation | in her first book | read it
prose: elegant, vivid, precise, masterful* / clumsy, pompous, lifeless, unreadable*
characters+: believable, complex, likeable, superb* / shallow, irritating, predictable, hateful*
opening chapter: intriguing, lively, funny, brilliant* / dull, confusing, slow, dreadful*
romance: tender, touching, plausible, enchanting* / corny, contrived, unconvincing, ridiculous*
humour: dry, clever, refreshing, hilarious* / childish, tired, crude, painful*
finale: thrilling, rewarding, bold, magnificent* / hurried, implausible, unsatisfying, absurd*
#
shop | of this shop, of the new shop, of their online store | at their competitors | order there
delivery: quick, punctual, careful, faultless* / late, unreliable, chaotic, hopeless*
support team: helpful, patient, competent, fantastic* / dismissive, unhelpful, clueless, appalling*
website: clear, fast, simple, excellent* / confusing, slow, cluttered, unusable*
packaging: solid, thoughtful, neat, perfect* / flimsy, wasteful, careless, ridiculous*
refund policy: fair, generous, transparent, superb* / unfair, vague, complicated, outrageous*
prices+: reasonable, honest, attractive, unbeatable* / steep, misleading, inflated, outrageous*
#
course | in this course, in the evening class, in the first term | in last year's course | take it
lectures+: engaging, clear, lively, inspiring* / boring, disorganised, monotonous, dreadful*
teacher: encouraging, knowledgeable, patient, wonderful* / impatient, vague, unprepared, hopeless*
exercises+: useful, challenging, varied, excellent* / pointless, repetitive, confusing, useless*
textbook: readable, thorough, helpful, outstanding* / dense, outdated, sloppy, unreadable*
feedback: detailed, constructive, prompt, invaluable* / superficial, harsh, late, worthless*
pace: comfortable, sensible, steady, ideal* / hectic, exhausting, uneven, unbearable*
#
airline | with this airline, on this trip, on the way back | with other airlines | fly with them
seats+: roomy, comfortable, soft, superb* / cramped, worn, hard, unbearable*
crew: friendly, calm, attentive, wonderful* / grumpy, careless, rude, appalling*
meal: tasty, hot, generous, delicious* / cold, bland, soggy, inedible*
boarding: quick, orderly, smooth, effortless* / chaotic, slow, stressful, disastrous*
cabin: clean, quiet, modern, immaculate* / stuffy, noisy, shabby, filthy*
lounge: quiet, stylish, welcoming, splendid* / crowded, shabby, draughty, horrible*
"""

_PLAIN = ("very", "really", "truly", "remarkably", "incredibly", "quite", "surprisingly")
_EXTREME = ("absolutely", "simply", "truly", "")
_WEAK = {NEGATIVE: ("a bit", "rather", "somewhat", "slightly"), POSITIVE: ("fairly", "pleasantly")}
# Said of the opposite word: "anything but dull" is praise. '{}' is the word.
_FLIPS = ("not at all {}", "not {} at all", "anything but {}", "far from {}", "never {}",
          "not in the least {}", "by no means {}", "not even remotely {}")  # fmt: skip
_FLIPS_EXTREME = ("far from {}", "anything but {}", "by no means {}")
_DEV_ONLY_FLIPS = ("by no means {}", "not even remotely {}")
_HELD_OUT_PAIRS = 0.15
_LEADS = ("", "", "", "honestly, ", "for me, ", "in the end, ", "as far as I can tell, ",
          "once again, ", "looking back, ")  # fmt: skip


@dataclass(frozen=True)
class _Aspect:
    name: str
    plural: bool
    words: tuple[tuple[str, ...], tuple[str, ...]]  # blame, praise

    @property
    def pronoun(self) -> str:
        return "they" if self.plural else "it"

    def be(self, past: bool) -> str:
        return ("were" if self.plural else "was") if past else ("are" if self.plural else "is")


@dataclass(frozen=True)
class _Domain:
    item: str
    places: tuple[str, ...]
    rival: str
    again: str
    aspects: tuple[_Aspect, ...]


def _parse(text: str) -> tuple[_Domain, ...]:
    domains = []
    for part in text.strip().split("\n#\n"):
        head, *lines = part.splitlines()
        item, places, rival, again = head.split(" | ")
        aspects = []
        for line in lines:
            name, words = line.split(": ")
            praise, blame = (tuple(side.split(", ")) for side in words.split(" / "))
            aspects.append(_Aspect(name.rstrip("+"), name.endswith("+"), (blame, praise)))
        domains.append(_Domain(item, tuple(places.split(", ")), rival, again, tuple(aspects)))
    return tuple(domains)


DOMAINS = _parse(_DOMAINS)


class _Writer:
    """Writes sentences of a wanted label; ``held_out`` turns true on what train may not contain."""

    def __init__(self, rng: random.Random, held_out_pairs: frozenset[tuple[str, str]]) -> None:
        self.rng = rng
        self.held_out_pairs = held_out_pairs
        self.held_out = False

    def sentence(self, label: int) -> tuple[str, bool]:
        """A sentence with ``label``, and whether it is for dev alone."""
        self.held_out = False
        self.past = self.rng.random() < 0.5
        self.domain = self.rng.choice(DOMAINS)
        self.first, self.second = self.rng.sample(self.domain.aspects, 2)
        template = self.rng.choice(_TEMPLATES)
        self.held_out |= template in _DEV_ONLY_TEMPLATES
        text = template(self, label)
        text = re.sub(r"\s+", " ", text).strip()
        return text[0].upper() + text[1:] + ".", self.held_out

    def word(self, aspect: _Aspect, polarity: int, *, extreme: bool = True) -> str:
        """A word of that polarity, with its mark taken off."""
        words = [w for w in aspect.words[polarity] if extreme or not w.endswith("*")]
        word = self.rng.choice(words).rstrip("*")
        self.held_out |= (aspect.name, word) in self.held_out_pairs
        return word

    def state(self, aspect: _Aspect, polarity: int) -> str:
        """A predicate without its verb: 'very dull', 'anything but dull'."""
        style = self.rng.random()
        if style < 0.42:
            flip = self.rng.choice(_FLIPS)
            self.held_out |= flip in _DEV_ONLY_FLIPS
            return flip.format(self.word(aspect, 1 - polarity, extreme=flip in _FLIPS_EXTREME))
        if style < 0.57:
            return (
                f"{self.rng.choice(_WEAK[polarity])} {self.word(aspect, polarity, extreme=False)}"
            )
        word = self.word(aspect, polarity)
        marked = word + "*" in aspect.words[polarity]
        return f"{self.rng.choice(_EXTREME if marked else _PLAIN)} {word}"

    def clause(self, aspect: _Aspect, polarity: int, *, place: bool = False) -> str:
        where = f" {self.rng.choice(self.domain.places)}" if place else ""
        be = aspect.be(self.past)
        return f"the {aspect.name}{where} {be} {self.state(aspect, polarity)}"

    def lead(self) -> str:
        return self.rng.choice(_LEADS)

    def pick(self, *options: str) -> str:
        return self.rng.choice(options)

    # Templates: each returns a sentence whose label is ``label``, whatever words fill it.

    def plain(self, label: int) -> str:
        return self.lead() + self.clause(self.first, label, place=True)

    def both(self, label: int) -> str:
        link = self.pick(" and ", ", and ", "; what is more, ")
        return self.lead() + self.clause(self.first, label) + link + self.clause(self.second, label)

    def but(self, label: int) -> str:
        """The last word counts: 'A, but B' has B's label; the verdict makes it certain."""
        rescue = (
            ("ruins everything", "spoils it all", "drags the whole experience down"),
            ("makes up for it", "saves it", "lifts the whole experience"),
        )[label]
        action = self.pick(*rescue)
        if self.second.plural:
            action = re.sub(r"^(\w+?)s\b", r"\1", action)
        bad = self.clause(self.first, 1 - label)
        how = self.word(self.second, label)
        return f"{self.lead()}{bad}, but the {how} {self.second.name} {action}"

    def but_clause(self, label: int) -> str:
        link = self.pick("but in the end what stays with me is that", "but what matters is that",
                         "but far more important,")  # fmt: skip
        return f"{self.clause(self.first, 1 - label)}, {link} {self.clause(self.second, label)}"

    def although(self, label: int) -> str:
        link = self.pick("although", "even though", "while")
        other = self.clause(self.first, 1 - label)
        verdict = (
            (f"I would not {self.domain.again} again", f"the {self.domain.item} let me down"),
            (f"I would gladly {self.domain.again} again", f"the {self.domain.item} won me over"),
        )[label]
        return f"{link} {other}, {self.clause(self.second, label)}, and {self.pick(*verdict)}"

    def in_spite(self, label: int) -> str:
        link = self.pick("in spite of the", "despite the", "for all its")
        verdict = (
            ("is not worth the money", "left me cold", "never won me over", "was a let-down"),
            ("is worth every penny", "won me over", "never let me down", "was a real pleasure"),
        )[label]
        other = f"{link} {self.word(self.first, 1 - label)} {self.first.name}"
        return f"{other}, this {self.domain.item} {self.pick(*verdict)}"

    def expected(self, label: int) -> str:
        aspect, said = self.first, self.rng.choice((NEGATIVE, POSITIVE))
        word = self.word(aspect, said)
        be = aspect.be(True)
        claim = self.pick(
            f"I had expected the {aspect.name} to be {word}",
            f"people had told me that the {aspect.name} {be} {word}",
            f"the reviews had called the {aspect.name} {word}",
        )
        if said == label:
            return f"{claim}, and {aspect.pronoun} really {be}"
        end = (f"but {aspect.pronoun} {be} nothing of the kind", "but that was simply not true",
               f"yet {aspect.pronoun} turned out to be {self.word(aspect, label)}")  # fmt: skip
        return f"{claim}, {self.pick(*end)}"

    def as_promised(self, label: int) -> str:
        aspect, said = self.first, self.rng.choice((NEGATIVE, POSITIVE))
        degree = (
            self.pick("every bit as", "just as", "fully as")
            if said == label
            else self.pick("not nearly as", "nowhere near as", "not half as", "by no means as")
        )
        self.held_out |= degree == "by no means as"
        against = (("as I had feared", "as the critics claim", "as my friends had warned"),
                   ("as I had hoped", "as the adverts promise", "as people say"))[said]  # fmt: skip
        word = self.word(aspect, said, extreme=False)
        be = aspect.be(self.past)
        return f"{self.lead()}the {aspect.name} {be} {degree} {word} {self.pick(*against)}"

    def compared(self, label: int) -> str:
        aspect = self.first
        be = aspect.be(self.past)
        long = [w for w in aspect.words[label] if len(w) >= 7 and not w.endswith("*")]
        if long and self.rng.random() < 0.5:  # "more bright" is no English
            word, degree = self.rng.choice(long), self.pick("far more", "even more", "much more")
            self.held_out |= (aspect.name, word) in self.held_out_pairs
        else:
            word = self.word(aspect, 1 - label, extreme=False)
            degree = self.pick("far less", "much less", "a lot less")
        return f"{self.lead()}the {aspect.name} {be} {degree} {word} than {self.domain.rival}"

    def wanted(self, label: int) -> str:
        item = self.domain.item
        hope = (
            f"I really wanted to {self.pick('like', 'love', 'recommend')} this {item}, but",
            f"I was {self.pick('ready to hate', 'prepared to dislike')} this {item}, but",
        )[label]
        return f"{hope} {self.clause(self.first, label)}"

    def nobody_could(self, label: int) -> str:
        denial = self.pick("nobody could call", "it would be wrong to call", "you can hardly call",
                           "I could never describe", "I would not call")  # fmt: skip
        self.held_out |= denial == "it would be wrong to call"
        as_ = " as" if "describe" in denial else ""
        word = self.word(self.first, 1 - label, extreme=label == POSITIVE)
        return f"{denial} the {self.first.name} {self.pick(*self.domain.places)}{as_} {word}"

    def again(self, label: int) -> str:
        answer = (
            ("I would never {} again", "nothing could make me {} again", "I refuse to {} again"),
            ("I would happily {} again", "I cannot wait to {} again", "I shall certainly {} again"),
        )[label]
        word = self.word(self.first, 1 - label, extreme=False)
        however = f"however {word} the {self.first.name} {self.first.be(True)}"
        return f"{self.pick(*answer).format(self.domain.again)}, {however}"

    def wrong_to_think(self, label: int) -> str:
        aspect, said = self.first, self.rng.choice((NEGATIVE, POSITIVE))
        verb = self.pick("think", ("fear", "hope")[said])
        how = "right" if said == label else self.pick("wrong", "mistaken", "foolish")
        thought = f"the {aspect.name} would be {self.word(aspect, said)}"
        return f"{self.lead()}I was {how} to {verb} that {thought}"


_Template = Callable[[_Writer, int], str]
_TEMPLATES: tuple[_Template, ...] = (
    _Writer.plain, _Writer.plain, _Writer.both, _Writer.but, _Writer.but_clause,
    _Writer.although, _Writer.in_spite, _Writer.expected, _Writer.as_promised,
    _Writer.compared, _Writer.wanted, _Writer.nobody_could, _Writer.again, _Writer.wrong_to_think,
)  # fmt: skip
_DEV_ONLY_TEMPLATES = (_Writer.in_spite,)


def _key(sentence: str) -> str:
    """What makes two sentences the same: their words, without the lead."""
    text = sentence.lower()
    for lead in _LEADS:
        text = text.removeprefix(lead)
    return re.sub(r"[^a-z ]", "", text)


def sentiment(n: int = 4800, seed: int = 0) -> TaskData:
    """``n`` different sentences of two classes of equal size, one in eight of them for dev.

    Half of dev is made of what train never shows: pairs of a thing and a word, turns of phrase, a
    whole template. The same (n, seed) gives the same rows everywhere.
    """
    if n < 64 or n % 2:
        raise DataError(f"sentiment(n={n}): expected an even number of sentences, 64 or more.")
    rng = random.Random(seed)
    pairs = [
        (a.name, w.rstrip("*")) for d in DOMAINS for a in d.aspects for s in a.words for w in s
    ]
    held_out_pairs = frozenset(rng.sample(pairs, round(_HELD_OUT_PAIRS * len(pairs))))
    writer = _Writer(rng, held_out_pairs)
    dev_each = n // 32
    room = {(label, kind): dev_each for label in (NEGATIVE, POSITIVE) for kind in ("seen", "new")}
    room |= {(label, "train"): n // 2 - 2 * dev_each for label in (NEGATIVE, POSITIVE)}
    rows: dict[str, list[tuple[str, int]]] = {"train": [], "seen": [], "new": []}
    keys: set[str] = set()
    for _ in range(100 * n):
        label = rng.randrange(2)
        sentence, held_out = writer.sentence(label)
        kinds = ("new",) if held_out else ("seen", "train")
        kind = next((k for k in kinds if room[label, k]), None)
        if kind is None or _key(sentence) in keys:
            continue
        keys.add(_key(sentence))
        rows[kind].append((sentence, label))
        room[label, kind] -= 1
        if not any(room.values()):
            break
    else:
        raise DataError(f"sentiment(n={n}): so many different sentences cannot be written.")
    dev = rows["seen"] + rows["new"]
    rng.shuffle(dev)
    return TaskData(
        task=TASK,
        train=_dataset(rows["train"]),
        validation={"validation": _dataset(dev)},
        source=f"synthetic: {n} generated sentences, seed {seed}; no real text",
    )


def _dataset(rows: list[tuple[str, int]]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"sentence": [text for text, _ in rows], "label": [label for _, label in rows]},
    )
