"""What SAGE's user is asked, and how its answers are read: as its published loop does (arXiv 2505.02847, appendix G).

Each request is one message: the whole template, with the profile, the emotion and the dialogue so far written into it.
The answers are free text, whose fields begin at `Content:`, `TargetCompletion:`, `Activity:`, `Analyse:` and `Change:`,
or at `Thinking:` and `Response:`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rlver_jax.decoding.script import parse_script
from rlver_jax.profiles.schema import Profile
from rlver_jax.user.emotion import CHANGES
from rlver_jax.user.sage_clone import SagePrompts
from rlver_jax.user.text_forms import Filled, Unreadable

# Our names of the appraisal's fields (dialogues.sage maps them back), as a script: what logs and `verify` go by.
FIELDS = {"content": "content", "target": "TargetCompletion", "activity": "activity", "feeling": "analyse"}
APPRAISAL = parse_script("".join(f"{name}:<<free:{name}>>\n" for name in FIELDS) + "change:\n<<choose:change>>")
REPLY = parse_script("thinking:<<free:thinking>>\nreply:<<free:reply>>")
MAX_TOKENS = 4096  # of an answer; SAGE bounds none, and an appraisal with its four texts takes hundreds
_INTEGER = re.compile(r"[+-]?\d{1,20}")


class Considered(NamedTuple):
    """A reply, and what was considered before it."""

    thinking: str
    reply: str


def appraisal_request(prompts: SagePrompts, profile: Profile, aloud: Sequence[str], emotion: int) -> str:
    """The prompt for an appraisal of the last message.

    Args:
        aloud: the messages, the user first, in turns.
        emotion: before it, as the number.
    """
    history = _history(prompts, aloud, 0)
    slots = {"emotion": str(emotion), "simulator_role": profile.persona, "simulator_scene": profile.scene}
    return _put(prompts.appraisal, slots | {"target": prompts.goal, "dialog_history": history})


def reply_request(
    prompts: SagePrompts, profile: Profile, aloud: Sequence[str], emotion: int, appraisal: Mapping[str, str] | None
) -> str:
    """The prompt for a reply.

    Args:
        aloud: the messages so far; none: the first words are wanted.
        emotion: after the appraisal; the prompt gets the name of its band.
        appraisal: by our names; None: the first words.
    """
    if appraisal is None:
        planning = prompts.opening
    else:
        theirs = {their: appraisal[ours] for ours, their in FIELDS.items()}
        planning = "".join(theirs[piece.field] if piece.field else piece.text for piece in prompts.planning)
    before, latest = (_history(prompts, aloud[:-2], 0), _history(prompts, aloud[-2:], len(aloud[:-2])))
    if not aloud:
        before, latest = prompts.no_history, ""
    slots = {"planning": planning, "target": prompts.goal, "emotion": band_name(prompts, emotion)}
    slots |= {"player_type": profile.persona, "player_topic": profile.scene}
    return _put(prompts.reply, slots | {"dialog_history": before, "new_history": latest})


def read_appraisal(answer: str) -> Filled:
    """Texts by our names and the change, limited to -10..10.

    Raises:
        Unreadable: no number stands behind `Change:`.
    """
    answer = _spoken(answer).replace("：", ":").replace("*", "")
    ends = {"content": "TargetCompletion:\n", "target": "Activity:\n", "activity": "Analyse:\n", "feeling": "Change:\n"}
    marks = {"content": "Content:", "target": "TargetCompletion:", "activity": "Activity:", "feeling": "Analyse:"}
    texts = {name: _bare(answer.split(marks[name])[-1].split(ends[name])[0]) for name in FIELDS}
    numbers = _INTEGER.findall(answer.split("Change:")[-1])
    if not numbers:
        raise Unreadable("number behind Change:", texts)
    return Filled(texts, max(CHANGES[0], min(CHANGES[-1], int(numbers[0]))))


def read_reply(answer: str) -> Considered:
    """What stands behind the last `Response:`, and the thinking before it.

    Raises:
        Unreadable: nothing stands there.
    """
    answer = _spoken(answer)
    reply = _bare(answer.split("Response:")[-1]).strip("“").strip("”").strip()
    if not reply:
        raise Unreadable("text behind Response:")
    return Considered(_bare(answer.split("Response:")[0].split("Thinking:\n")[-1]), reply)


def band_name(prompts: SagePrompts, emotion: int) -> str:
    """The clone's name of the band of an emotion."""
    return next((name for name, least in prompts.bands.items() if emotion >= least), prompts.lowest)


def _history(prompts: SagePrompts, aloud: Sequence[str], first: int) -> str:
    """Messages as JSON; `first` is the number of the first, and even numbers are the user's."""
    roles = ("user", "assistant")
    messages = [{"role": prompts.speakers[roles[(first + i) % 2]], "content": text} for i, text in enumerate(aloud)]
    return json.dumps(messages, ensure_ascii=False, indent=2)


def _put(template: str, slots: Mapping[str, str]) -> str:
    """In the order of SAGE's own replacements: the dialogue comes last, so that no reply can fill a slot before it."""
    for name, text in slots.items():
        template = template.replace(f"{{{{{name}}}}}", text)
    return template


def _spoken(answer: str) -> str:
    """An answer without the thoughts of a reasoning model."""
    return answer.rpartition("</think>")[2].replace("\r\n", "\n")


def _bare(text: str) -> str:
    return text.strip("\n").strip("[").strip("]")
