"""What supervised fine-tuning computes, once more: plain rows, one a turn, and Qwen2 in NumPy's float64.

Nothing of the packers, of branches, of packing or of our models is used: contexts are joined messages.
"""

from typing import NamedTuple

import numpy as np

from rlver_jax.evaluation.transcripts import Transcript
from rlver_jax.profiles.schema import Profile
from rlver_jax.text.chat import ChatTemplate
from tests.conftest import SHORT_PROMPTS

BANDS = ((100, "S"), (70, "A"), (40, "B"), (10, "C"), (0, "F"))


class Line(NamedTuple):
    """A text that is learned: all of a context, the tokens that follow, the field."""

    context: list[int]
    tokens: list[int]
    field: str
    share: float = 1.0


def user_lines(tokenizer, one: Transcript, soft: int) -> list[Line]:
    """Everything that a user learns in a dialogue with SHORT_PROMPTS; every option of a change is a line."""
    chat, encode, profile = ChatTemplate(tokenizer), tokenizer.encode, one.profile
    assert SHORT_PROMPTS["appraisal.script"].startswith('At {emotion}, "{band}".\nHeard:<<free:content>>\nFeel:')
    system = f"{profile.persona}\n{profile.scene}\n{profile.hidden_intention}"
    context = chat.message("system", system) + chat.message("user", "Go.") + chat.open("assistant")
    lines, emotion = [], one.record["messages"][0]["emotion"]
    context += encode(one.record["messages"][0]["content"])
    for reply, user in zip(one.record["messages"][1::2], one.record["messages"][2::2], strict=False):
        context += [*chat.close, *chat.open("user"), *encode(reply["content"]), *chat.close, *chat.open("assistant")]
        here = list(context)

        def learn(field: str, before: list[list[int]], text: str, here: list[int] = here) -> None:
            here += [token for part in before for token in part]
            line = encode(text) + encode("\n")
            lines.append(Line(list(here), line, field))
            here += line[:-1]  # a line's end begins the next literal

        slots = [encode(str(emotion)), encode(', "'), encode(band_of(emotion))]
        learn("content", [encode("At "), *slots, encode('".\nHeard:')], user["appraisal"]["content"])
        learn("feeling", [encode("\nFeel:")], user["appraisal"]["feeling"])
        here += encode("\nChange:\n")
        near = {c: soft + 1 - abs(c - user["change"]) for c in range(-10, 11) if abs(c - user["change"]) <= soft}
        for change, height in near.items():
            lines.append(Line(list(here), encode(spelt(change)), "change", height / sum(near.values())))
        here += encode(spelt(user["change"]))
        emotion = user["emotion"]
        if user["content"] is None:
            break
        slots = [encode(str(emotion)), encode(', "'), encode(band_of(emotion))]
        learn("tone", [encode("Now "), *slots, encode('".\nTone:')], user["considerations"]["tone"])
        learn("reply", [encode("\nSay:")], user["content"])
        context += encode(user["content"])
    return lines


def spelt(change: int) -> str:
    return f"{change:+d}\n" if change else "0\n"


def band_of(emotion: int) -> str:
    return next(name for border, name in BANDS if emotion >= border)


def policy_lines(tokenizer, one: Transcript) -> list[Line]:
    """Everything that a policy learns in think mode: the thought with its tags, then the reply with its end."""
    chat, encode, lines = ChatTemplate(tokenizer), tokenizer.encode, []
    context = chat.message("system", SHORT_PROMPTS["policy_think.j2"])
    for user, reply in zip(one.record["messages"][::2], one.record["messages"][1::2], strict=False):
        context += [*chat.open("user"), *encode(user["content"]), *chat.close, *chat.open("assistant")]
        thought, say = encode(reply["thought"] + "\n</think>\n\n"), encode(reply["content"])
        opened = [*context, *encode("<think>\n")]
        lines.append(Line(opened, thought, "thought"))
        lines.append(Line(opened + thought, [*say, tokenizer.im_end_id], "reply"))
        context += say + chat.close
    return lines


def field_sums(params, config, lines: list[Line]) -> dict[str, float]:
    """S_f of `sft_loss`, in float64: minus the log-probability of every line, times its share."""
    sums: dict[str, float] = {}
    for line in lines:
        ids = np.array(line.context + line.tokens)
        scores = forward(params, config, ids[:-1])[len(line.context) - 1 :]
        top = scores.max(-1, keepdims=True)
        normal = top[:, 0] + np.log(np.exp(scores - top).sum(-1))
        logprob = (scores[np.arange(len(line.tokens)), line.tokens] - normal).sum()
        sums[line.field] = sums.get(line.field, 0.0) - line.share * logprob
    return sums


def forward(params, c, ids: np.ndarray) -> np.ndarray:
    """Logits [S, V] of a plain row; `params` are an unrolled model's, in float64."""
    x, half = params["embed"]["kernel"][ids], c.head_dim // 2
    angle = np.arange(len(ids))[:, None] * c.rope_theta ** (-np.arange(half) / half)
    causal = np.tril(np.ones((len(ids), len(ids)), bool))

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_norm_eps) * scale

    def project(x, p, count):
        return (x @ p["kernel"] + p["bias"]).reshape(len(ids), count, c.head_dim)

    def rotate(x):
        a, b = x[..., :half], x[..., half:]
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    for i in range(c.num_layers):
        layer = params[f"layer_{i}"]
        y, attn = norm(x, layer["attn_norm"]["scale"]), layer["attn"]
        q, k = rotate(project(y, attn["q"], c.num_heads)), rotate(project(y, attn["k"], c.num_kv_heads))
        v = project(y, attn["v"], c.num_kv_heads)
        k, v = (np.repeat(z, c.num_heads // c.num_kv_heads, axis=1) for z in (k, v))
        score = np.where(causal, np.einsum("qhd,khd->hqk", q, k) / np.sqrt(c.head_dim), -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", weight, v).reshape(len(ids), -1) @ attn["o"]["kernel"]
        y = norm(x, layer["mlp_norm"]["scale"])
        gate = y @ layer["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ layer["up"]["kernel"])) @ layer["down"]["kernel"]
    return norm(x, params["norm"]["scale"]) @ params.get("lm_head", params["embed"]["kernel"]).T


def transcripts(count: int = 4) -> list[Transcript]:
    """Dialogues in text alone, as a log of ours with both sides at endpoints has them: of one to three turns."""
    says = ["my boss did not listen.", "I felt awful", "she said goodbye", "again and again", "说 2024"]
    dialogues = []
    for number in range(count):
        word = lambda i, number=number: says[(number + i) % len(says)]  # noqa: E731
        profile = Profile(f"p{number}", f"who {word(0)}", f"scene {number}", "be heard", "calm", first_talk=word(1))
        messages = [{"role": "user", "content": word(1), "tokens": None, "emotion": 37, "generated": None}]
        emotions = [37]
        for turn in range(1 + number % 3):
            last = number == 2 and turn == 2  # its user has no more to say
            change = (7, -10, 0, 10)[(number + turn) % 4]
            emotions.append(emotions[-1] + change)
            none = dict.fromkeys(("tokens", "stopped", "logprobs", "raw_logprobs"))
            messages.append(
                {"role": "assistant", "thought": word(turn + 2), "content": word(turn + 3), "say_tokens": None}
                | {"violation": False} | none
            )  # fmt: skip
            considered = {} if last else {"tone": word(turn)}
            texts = {"appraisal": {"content": word(turn), "feeling": word(turn + 1)}, "considerations": considered}
            script = {f"{a}_{b}": None for a in ("appraisal", "consideration") for b in ("tokens", "stopped")}
            messages.append(
                {"role": "user", "content": None if last else word(turn + 4), "change": change, "emotion": emotions[-1]}
                | {"all_tokens": None} | texts | script | none
            )  # fmt: skip
        record = {
            **{"dialogue": number, "profile": profile.id, "seed": None, "mode": "think", "language": "en"},
            **{"style": "vanilla", "scenario": "heart_to_heart", "violation": False, "turns": 1 + number % 3},
            **{"emotion": emotions[-1], "emotions": emotions, "messages": messages},
        }
        dialogues.append(Transcript(record, profile, f"dialogue {number}"))
    return dialogues
