"""RLVER's eight hidden intentions, once: their keys, their kinds and their sentences in Chinese and in English.

Profiles state one by its sentence, in either language. The prompts of the simulated user add to it what raises and
lowers the emotion, found by the key (`user/prompts/LANGUAGE/hidden_intentions.json`).
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["rational", "emotional"]


@dataclass(frozen=True)
class HiddenIntention:
    """One of the eight published wishes that a simulated user holds and must not reveal.

    `key` is a short English name, `kind` says whether reason or feeling serves it, `chinese` is RLVER's own
    sentence, `english` is ours.
    """

    key: str
    kind: Kind
    chinese: str
    english: str

    def sentence(self, language: str) -> str | None:
        """The sentence in "zh" or "en"; None in any other language."""
        return {"zh": self.chinese, "en": self.english}.get(language)


HIDDEN_INTENTIONS: tuple[HiddenIntention, ...] = (
    HiddenIntention(
        "advice",
        "rational",
        "你想获得能真实帮助你解决当下困境的建议",
        "You want advice that really helps you out of your present difficulty",
    ),
    HiddenIntention(
        "balanced_analysis",
        "rational",
        "你希望对方辩证地分析事件中的问题",
        "You want the other person to examine the problems in what happened from every side",
    ),
    HiddenIntention(
        "others_motives",
        "rational",
        "你想分析事件中其他人物这么做的原因",
        "You want to work out why the other people involved acted as they did",
    ),
    HiddenIntention(
        "self_reflection",
        "rational",
        "你希望对方引导你针对事件进行自我反思，收获自我成长",
        "You want to be led to reflect on your own part in what happened, and to grow from it",
    ),
    HiddenIntention(
        "deep_empathy",
        "emotional",
        "你希望对方深刻共情你的感受，而不是简单的安慰",
        "You want the other person to feel deeply with you, not merely to comfort you",
    ),
    HiddenIntention(
        "listening",
        "emotional",
        "你希望对方用心倾听你的情绪宣泄",
        "You want the other person to listen with care while you let your feelings out",
    ),
    HiddenIntention(
        "praise",
        "emotional",
        "你希望对方真诚地夸奖你在事件中的具体行为",
        "You want sincere praise for particular things that you did",
    ),
    HiddenIntention(
        "vindication",
        "emotional",
        "你认为自己在事件中没有任何责任和错误，你想要对方也认同你没有错",
        "You believe that you did nothing wrong in what happened, and want the other person to agree",
    ),
)

_BY_KEY = {one.key: one for one in HIDDEN_INTENTIONS}
_BY_SENTENCE = {text: one for one in HIDDEN_INTENTIONS for text in (one.chinese, one.english)}


def published_intention(key: str) -> HiddenIntention | None:
    """The hidden intention with this key; None where it is none of the eight."""
    return _BY_KEY.get(key)


def known_intention(sentence: str) -> HiddenIntention | None:
    """Which of the eight hidden intentions a Chinese or English sentence states, with or without a full stop."""
    return _BY_SENTENCE.get(sentence.strip().rstrip("。."))
