"""The person's side of a conversation: plain lines, so that it works over ssh and through a pipe."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rlver_jax.dialogues.log import write_dialogues
from rlver_jax.dialogues.render import change_text, emotion_bar, message_lines
from rlver_jax.profiles.schema import Profile
from rlver_jax.serving.conversation import Conversation
from rlver_jax.text.console import plain

HELP = "/quit (or the end of input) ends, /help shows this, /profile shows who the user is"


@contextlib.contextmanager
def _without_echo() -> Iterator[None]:
    """Within it the terminal shows nothing of what is typed; it stays in the line that is asked for next."""
    try:
        import termios
    except ImportError:  # another system's terminal
        yield
        return
    try:
        stream = sys.stdin.fileno()
        before = termios.tcgetattr(stream)
    except (OSError, ValueError, termios.error):  # no terminal
        yield
        return
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(stream, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(stream, termios.TCSANOW, before)


class Left(Exception):
    """The person has left."""


class Terminal:
    """Plays a conversation with a person and keeps its transcript, whole after every message."""

    def __init__(self, talk: Conversation, profile: Profile, side: str, out: Path, console: Console):
        """`side`: which one the person takes, "user" or "policy"."""
        self._talk, self._profile, self._side, self._out, self._console = talk, profile, side, out, console
        self._compiled: set[str] = set()  # what has been done once
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):  # line editing and history where Python has them
                import readline  # noqa: F401

    def run(self) -> None:
        """Talks until the dialogue ends or the person leaves."""
        self._introduce()
        try:
            (self._as_user if self._side == "user" else self._as_policy)()
        except Left:
            self._console.print()
        finally:
            self._save()
        self._conclude()

    def _introduce(self) -> None:
        you = "the user" if self._side == "user" else "the policy: help the user"
        self._note(f"You are {you}. {HELP}")
        if self._side == "user":
            self._show_profile()
        self._console.print(emotion_bar(self._talk.record["emotion"]))

    def _show_profile(self) -> None:
        p = self._profile
        for name, text in (("persona", p.persona), ("scene", p.background), ("hidden intention", p.hidden_intention)):
            self._console.print(Text.assemble((f"{name}  ", "dim"), plain(text).strip()))
        if p.first_talk:
            self._console.print(Text.assemble(("it could begin  ", "dim"), plain(p.first_talk).strip()))

    def _as_user(self) -> None:
        talk = self._talk
        while not talk.ended:
            talk.user_says(self._ask())
            self._save()
            self._busy("the policy thinks", talk.policy_replies)
            if not talk.ended:
                self._note("your emotion, as the simulated user sees it")
                self._busy("the simulated user appraises", lambda: talk.user_reacts(ends=False))

    def _as_policy(self) -> None:
        talk = self._talk
        with self._waiting("the user finds its first words"):
            first = talk.user_begins()
        self._console.print(Text.assemble(("user  ", "bold magenta"), plain(first)))
        while not talk.ended:
            talk.policy_says(self._ask())
            self._save()
            self._busy("the user thinks", lambda: talk.user_reacts(ends=True))

    def _busy(self, what: str, act: Callable[[], dict]) -> None:
        """Runs a model's turn and prints its message."""
        with self._waiting(what):
            message = act()
        for line in message_lines(message):
            self._console.print(line, highlight=False)
        self._save()

    @contextlib.contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        """Says what is waited for, the first time mostly the compiler. What is typed meanwhile is not echoed."""
        text = what if what in self._compiled else f"compiling, once, then {what}"
        self._compiled.add(what)
        if not self._console.is_terminal:
            yield
            return
        with _without_echo(), self._console.status(text):
            yield

    def _ask(self) -> list[int]:
        """What the person says, in tokens."""
        while True:
            try:
                text = input(f"\n{self._side}> ").strip()
            except EOFError:
                raise Left from None
            if text == "/quit":
                raise Left
            if text == "/help" or (text.startswith("/") and text != "/profile"):
                self._note(HELP)
            elif text == "/profile":
                self._show_profile()
            elif text:
                try:
                    return self._talk.encode(text, self._side)
                except ValueError as error:
                    self._note(str(error))

    def _note(self, text: str) -> None:
        self._console.print(Text(text, "dim"), soft_wrap=True)

    def _save(self) -> None:
        if self._talk.record["messages"]:
            write_dialogues(self._out, [self._talk.record])

    def _conclude(self) -> None:
        record = self._talk.record
        moved = change_text(record["emotion"] - record["initial_emotion"])
        ended = f" · {record['end_reason']}" if self._talk.ended else ""
        start = f"{record['turns']} turns{ended} · emotion {record['initial_emotion']} → {record['emotion']} ("
        self._console.print(Text.assemble(start, moved, ")"))
        if record["messages"]:
            self._console.print(f"transcript: {self._out}", markup=False, highlight=False, soft_wrap=True)
