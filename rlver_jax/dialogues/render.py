"""A dialogue in the terminal.

Text of models and profiles goes into `Text`, which has no markup, without characters that move the cursor, recolour the
terminal or reorder the line: a reply can't draw over the emotion that it earned.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from rlver_jax.dialogues.log import Record
from rlver_jax.text.console import plain, plain_line
from rlver_jax.user.emotion import SAGE

Evaluated = tuple[Mapping[str, Any], Sequence[Record]]  # an evaluation's summary and dialogues
_COMPARED = {
    "score": "mean final emotion, by the simulated user",
    "rule_score": "the same dialogues, by the gold judge",
    "success": "successes (emotion 100)",
    "failure": "failures (emotion below 10)",
    "turns_mean": "turns",
    "n": "dialogues",
}
BAR = 25  # characters for emotions 0..100
_BAND_STYLES = {"S": "bold green", "A": "green", "B": "yellow", "C": "dark_orange", "F": "red"}


def emotion_bar(emotion: int) -> Text:
    """`██████░░░░  43 B`: a bar, the number and its band (SAGE's borders)."""
    filled = round(min(max(emotion, 0), 100) / 100 * BAR)  # RLVER's logs may go below 0
    band = SAGE.band_name(emotion)
    return Text.assemble(
        ("█" * filled, _BAND_STYLES[band]), ("░" * (BAR - filled), "dim"), f" {emotion:3d} ", (band, _BAND_STYLES[band])
    )


def change_text(change: int) -> Text:
    """A change with its sign: green up, red down, dim for none."""
    return Text(f"{change:+d}" if change else "0", "green" if change > 0 else "red" if change < 0 else "dim")


def render_dialogue(record: Record) -> Group:
    """One dialogue of a log: thoughts and appraisals dim, messages plain, the emotion after each turn."""
    profile, mode = plain_line(record["profile"])[:36], plain_line(record["mode"])
    title = f"dialogue {record['dialogue']} · profile {profile} · {mode}"
    hidden = Text.assemble(("hidden intention  ", "dim"), plain(record["hidden_intention"]))
    return Group(Rule(Text(title)), hidden, *_messages(record), Rule(_ending(record)))


def print_dialogue(record: Record, console: Console) -> None:
    """Prints `render_dialogue`."""
    console.print(render_dialogue(record), highlight=False)


def print_comparison(before: Evaluated, after: Evaluated, console: Console) -> None:
    """Prints the first profile's dialogue of two evaluations, and their scores side by side."""
    profile = after[1][0]["profile"]
    for name, (_, records) in (("before", before), ("after", after)):
        record = next((r for r in records if r["profile"] == profile), None)
        if record is not None:
            console.print(Text(f"\n{name}", "bold"))
            print_dialogue(record, console)
    table = Table("", "before", "after")
    for key, what in _COMPARED.items():
        if before[0].get(key) is not None and after[0].get(key) is not None:
            table.add_row(what, *(f"{summary[key]:.2f}".removesuffix(".00") for summary, _ in (before, after)))
    console.print(table)


def _messages(record: Record) -> Iterator[Text | Padding]:
    turn = 0
    for message in record["messages"]:
        if message["role"] == "assistant":
            turn += 1
            yield Text(f"\nturn {turn}", "bold dim")
        yield from message_lines(message)


def message_lines(message: Record) -> Iterator[Text | Padding]:
    """One message of a record: thought and reply, or the user's reaction and its emotion."""
    if message["role"] == "assistant":
        if message["thought"]:
            yield _block("thinks", message["thought"], "dim italic")
        yield _utterance("policy", message["content"], "cyan")
        if message["violation"]:
            yield Text("broke the think format", "red")
        return
    yield from _reaction(message)
    if message["content"] is not None:
        yield _utterance("user", message["content"], "magenta")
    yield emotion_bar(message["emotion"])


def _reaction(message: Record) -> Iterator[Text | Padding]:
    for name, text in message.get("appraisal", {}).items():
        yield _block(name, text, "dim")
    if "change" in message:
        yield Text.assemble(("  change  ", "dim"), change_text(message["change"]))
    for name, text in message.get("considerations", {}).items() if message["content"] is not None else ():
        yield _block(name, text, "dim")


def _utterance(who: str, text: str, style: str) -> Text:
    return Text.assemble((f"{who}  ", f"bold {style}"), plain(text))


def _block(name: str, text: str, style: str) -> Padding:
    return Padding(
        Text.assemble((f"{plain_line(name)}  ", "dim bold"), (plain(text), style)), (0, 0, 0, 2), expand=False
    )


def _ending(record: Record) -> Text:
    moved = change_text(record["emotion"] - record["initial_emotion"])
    return Text.assemble(
        f"{record['end_reason']} after {record['turns']} turns · emotion {record['initial_emotion']} → "
        f"{record['emotion']} (",
        moved,
        f") · reward {record['reward']:g}",
    )
