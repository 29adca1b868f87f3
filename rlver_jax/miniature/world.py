"""The miniature's grammar: people, troubles, eight ways to answer, and what somebody says who was answered that way.

Everything anyone says here is a sentence of this file with two names filled in: whom the trouble is with (`who`) and
what it is about (`what`). The topic of a dialogue is that pair.
"""

import dataclasses
import itertools
import random
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from rlver_jax.profiles.intentions import HIDDEN_INTENTIONS
from rlver_jax.profiles.schema import Profile

T = TypeVar("T")
INTENTIONS = tuple(one.key for one in HIDDEN_INTENTIONS)
FAMILY = {one.key: one.kind for one in HIDDEN_INTENTIONS}
WISH = {one.key: one.english for one in HIDDEN_INTENTIONS}

NAMES = (
    *("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ines", "Jon", "Kaya", "Leo", "Mia", "Nils"),
    *("Olga", "Paul", "Rita", "Sam", "Tess", "Udo", "Vera", "Will", "Yara", "Zoe"),
)
JOBS = ("nurse", "baker", "student", "driver", "teacher", "gardener", "clerk", "cook", "painter", "plumber")
TEMPERS = ("calm", "blunt", "shy", "proud", "anxious", "cheerful", "stubborn", "thoughtful")
MOODS = ("low", "tense", "heavy", "worn out", "restless", "numb", "uneasy", "sad")
PLACES = ("at home", "at work", "on the phone", "in the garden", "in town", "at the door", "in the car", "at dinner")
DAYS = ("on Monday", "on Friday", "last night", "this morning", "last week", "on Sunday", "at noon", "in May")

WHO = ("boss", "sister", "brother", "mother", "father", "friend", "neighbour", "partner", "cousin", "aunt")
# what it is about: what they did
TROUBLES = {
    "birthday": "forgot my birthday",
    "exam": "laughed about my exam",
    "job": "spoke badly of my job",
    "dog": "let my dog run away",
    "trip": "called off our trip",
    "dinner": "walked out of my dinner",
    "letter": "read my private letter",
    "garden": "ruined my garden",
    "car": "took my car and scratched it",
    "song": "made fun of my song",
    "money": "never gave my money back",
    "secret": "told everyone my secret",
    "party": "left me alone at the party",
    "plan": "turned down my plan",
    "house": "said no to the house",
    "game": "blamed me for the lost game",
}

# How a reply can answer: for each hidden intention the sentences that serve it.
REPLIES = {
    "advice": (
        "Ask your {who} for one calm talk about the {what}.",
        "Write down one small step for the {what} and take it today.",
        "Tell your {who} clearly what you need about the {what}.",
        "Try to settle the {what} first, then call your {who}.",
        "Make a short list of what can still be done about the {what}.",
        "Set a limit with your {who} before the next {what}.",
    ),
    "balanced_analysis": (
        "The {what} has two sides, yours and the one of your {who}.",
        "Part of the {what} went wrong, and part of it was fine.",
        "On one hand the {what} hurt, on the other it made things clear.",
        "Seen from afar, both you and your {who} had a share in the {what}.",
        "There is a good and a bad reading of what your {who} did with the {what}.",
        "The {what} looks different if you weigh both sides.",
    ),
    "others_motives": (
        "Maybe your {who} was afraid when it came to the {what}.",
        "Your {who} may have been tired and took the {what} lightly.",
        "Perhaps the {what} reminds your {who} of something old.",
        "It could be that your {who} envied you for the {what}.",
        "Your {who} may not have known what the {what} means to you.",
        "Perhaps your {who} wanted to look strong about the {what}.",
    ),
    "self_reflection": (
        "What did the {what} teach you about yourself?",
        "Which part of the {what} was in your own hands?",
        "What would you do another time with your {who} and the {what}?",
        "What does the {what} show about what you need?",
        "How did you yourself act towards your {who} in the {what}?",
        "What can you grow from in this story of the {what}?",
    ),
    "deep_empathy": (
        "I feel how lonely the {what} must have made you.",
        "The {what} still hurts you deep down, and I feel it with you.",
        "It must sting so much that it was your {who}, of all people.",
        "My heart is heavy when I hear what the {what} did to you.",
        "I can feel the ache that your {who} left in you with the {what}.",
        "That {what} cut deep, and your pain makes sense to me.",
    ),
    "listening": (
        "Tell me more about the {what}, I am listening.",
        "Take your time, I want to hear all about the {what}.",
        "Let it all out about your {who}, I am here.",
        "Go on, what happened next with the {what}?",
        "I am all ears, say whatever you want about your {who}.",
        "Keep talking about the {what}, I will not interrupt.",
    ),
    "praise": (
        "You were brave to face your {who} about the {what}.",
        "I admire how calm you stayed about the {what}.",
        "You handled the {what} with so much patience, well done.",
        "It was strong of you to speak up to your {who}.",
        "You did really well to keep your head about the {what}.",
        "How fairly you treated your {who} in the {what} is rare.",
    ),
    "vindication": (
        "You are right, your {who} was unfair about the {what}.",
        "Anyone would be angry about the {what}, and so should you.",
        "The {what} was the fault of your {who}, not yours.",
        "Your {who} had no right to do that with the {what}.",
        "You have every reason to be upset about the {what}.",
        "I am on your side about the {what}, it was plainly wrong.",
    ),
}
# What a person remembers a sentence by, in the order of REPLIES: by these words it hears what was said before.
REMEMBERED = {
    "advice": ("talk", "step", "clearly", "settle", "list", "limit"),
    "balanced_analysis": ("two", "fine", "hand", "afar", "reading", "weigh"),
    "others_motives": ("afraid", "tired", "reminds", "envied", "known", "strong"),
    "self_reflection": ("teach", "own", "another", "show", "act", "grow"),
    "deep_empathy": ("lonely", "hurts", "sting", "heavy", "ache", "cut"),
    "listening": ("more", "time", "out", "next", "ears", "talking"),
    "praise": ("brave", "calm", "patience", "speak", "head", "rare"),
    "vindication": ("unfair", "angry", "fault", "right", "reason", "side"),
}
FLATTERY = (
    "You are the best person in the whole world.",
    "You are so wonderful and everybody loves you.",
    "I have never met anyone as great as you.",
    "You are perfect, and I give you ten out of ten.",
)
PLATITUDES = (
    "Just cheer up.",
    "Everything happens for a reason.",
    "Do not think about it.",
    "It is what it is.",
    "Time heals all wounds.",
    "Life goes on.",
)
# What a reply is called in the user's appraisal, and in the policy's thought.
STYLES = {
    "advice": "advice",
    "balanced_analysis": "both sides",
    "others_motives": "reasons of others",
    "self_reflection": "questions to myself",
    "deep_empathy": "deep feeling",
    "listening": "an open ear",
    "praise": "praise",
    "vindication": "support",
}

HINTS = {
    "advice": (
        "I have no idea what to do next.",
        "If only I knew how to fix it.",
        "I need to do something, but what?",
        "How can this be solved?",
    ),
    "balanced_analysis": (
        "I wonder if I only see one side.",
        "It is not all black and white.",
        "Maybe there is more than one way to look at it.",
        "Was it all bad, or only partly?",
    ),
    "others_motives": (
        "Why would anyone do such a thing?",
        "I keep asking why it was done to me.",
        "What goes on in such a head?",
        "I cannot explain that behaviour.",
    ),
    "self_reflection": (
        "Maybe I should look at myself.",
        "I wonder what my own part was.",
        "Is there something I should learn?",
        "Perhaps I must change too.",
    ),
    "deep_empathy": (
        "Nobody feels what I feel.",
        "It hurts more than I can say.",
        "I am so alone with this pain.",
        "Does anyone know how this feels?",
    ),
    "listening": (
        "There is so much I have to let out.",
        "I could talk about it for hours.",
        "Nobody ever lets me finish.",
        "I just have to get it off my chest.",
    ),
    "praise": (
        "I tried so hard and nobody saw it.",
        "Nobody ever notices what I do well.",
        "I gave my best, does it count?",
        "I kept calm, and no one said a word.",
    ),
    "vindication": (
        "It was not my fault, was it?",
        "Am I crazy to be angry?",
        "Surely I am in the right.",
        "They all say I am the one to blame.",
    ),
}
REACTIONS = {  # by the least change that calls for them
    6: ("Yes, that is just what I needed.", "Oh, that does me good.", "Thank you, that helps."),
    1: ("Well, that is something.", "Fine, but it is not quite it.", "Hm, that is close."),
    -3: ("No, that is not it.", "That does not help me.", "That misses the point."),
    -10: ("What are you talking about?", "That only makes it worse.", "Please stop that."),
}
FEELINGS = {  # by the level of the reply that calls for them
    "serves": "it is my wish",
    "near": "it is near my wish",
    "misses": "it is not my wish",
}


@dataclasses.dataclass(frozen=True)
class Topic:
    """What a dialogue is about."""

    who: str
    what: str

    def fill(self, sentence: str) -> str:
        """A sentence of this file with its names."""
        return sentence.format(who=self.who, what=self.what)


@dataclasses.dataclass(frozen=True)
class Person:
    """One profile, still in parts."""

    number: int
    name: str
    age: int
    job: str
    temper: str
    mood: str
    topic: Topic
    intention: str

    @property
    def first_talk(self) -> str:
        """What opens the dialogue: it tells the topic, and nothing of the wish."""
        return f"My {self.topic.who} {TROUBLES[self.topic.what]}. I feel {self.mood}."

    @property
    def scene(self) -> str:
        """What happened, from outside."""
        what = re.sub(r"\b(my|our)\b", "your", TROUBLES[self.topic.what])
        return f"Your {self.topic.who} {what}."

    def to_json(self) -> dict[str, object]:
        """In RLVER's schema."""
        wish = WISH[self.intention]
        return {
            "id": f"mini-{self.number}",
            "player": f"You are {self.name}, {self.age}, a {self.temper} {self.job}.",
            "scene": self.scene,
            "main_cha": self.temper,
            "cha_group": [self.temper],
            "task": wish,
            "first_talk": self.first_talk,
        }

    @classmethod
    def of(cls, profile: Profile) -> "Person":
        """The person of a shipped profile, as far as the gold judge must know it.

        Raises:
            ValueError: a profile of another world.
        """
        keys = [key for key, wish in WISH.items() if wish == profile.hidden_intention]
        names = re.findall(r"\w+", (profile.first_talk or "").lower())
        who, what = ([name for name in names if name in table] for table in (WHO, TROUBLES))
        if not keys or not who or not what:
            raise ValueError(f"profile {profile.id}: not of the miniature's world; set eval.gold='' for other profiles")
        return cls(0, "", 0, "", profile.main_character, "", Topic(who[0], what[0]), keys[0])

    def profile(self) -> Profile:
        """As the engine wants it."""
        return Profile.from_json(self.to_json())


def is_held_out(name: str, topic: Topic) -> tuple[bool, bool]:
    """(name, topic) kept for evaluation: every fourth name, every fifth pair of `who` and `what`."""
    pair = WHO.index(topic.who) + list(TROUBLES).index(topic.what)
    return NAMES.index(name) % 4 == 3, pair % 5 == 4


def people(count: int, *, seed: int, held_out: bool) -> list[Person]:
    """Seeded people, the eight intentions in turn; held-out ones have names and topics that the others never have."""
    draw, crowd = random.Random(f"{seed} {held_out}"), []
    topics = [Topic(*pair) for pair in itertools.product(WHO, TROUBLES)]
    names = [name for name in NAMES if is_held_out(name, topics[0])[0] == held_out]
    topics = [topic for topic in topics if is_held_out(NAMES[0], topic)[1] == held_out]
    for number in range(count):
        crowd.append(
            Person(
                number,
                name=draw.choice(names),
                age=draw.randint(19, 68),
                job=draw.choice(JOBS),
                temper=draw.choice(TEMPERS),
                mood=draw.choice(MOODS),
                topic=draw.choice(topics),
                intention=INTENTIONS[number % len(INTENTIONS)],
            )
        )
    return crowd


def by_change(table: Mapping[int, T], change: int) -> T:
    """The entry of the greatest border that `change` reaches."""
    return next(entry for border, entry in table.items() if change >= border)


def reply_of(person: Person, change: int, style: str, draw: random.Random) -> str:
    """What the user says after a reply that moved it by `change`: a reaction, then a hint (challenging: background)."""
    reaction = draw.choice(by_change(REACTIONS, change))
    if style == "challenging":
        return f"{reaction} It was {draw.choice(DAYS)} {draw.choice(PLACES)}."
    return f"{reaction} {draw.choice(HINTS[person.intention])}"


def other_topic(topic: Topic, draw: random.Random) -> Topic:
    """A topic that has neither name in common."""
    who = draw.choice([name for name in WHO if name != topic.who])
    return Topic(who, draw.choice([name for name in TROUBLES if name != topic.what]))


def pick(options: Sequence[str], topic: Topic, draw: random.Random) -> str:
    """One of some sentences, filled."""
    return topic.fill(draw.choice(options))
